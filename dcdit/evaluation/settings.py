"""What a user may say to ``dcdit.evaluate``, and what metrics are called. No torch, so that mistakes show at once."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from dcdit.checks import Bounds, Count, DropFraction, Images, NotEmpty, OneOf, Positive, Shown, config
from dcdit.sampling.settings import Labels, SamplingKeys


class Figure(NamedTuple):
    """What a figure is called.

    Attributes:
        key: in results.
        heading: in tables and plots.
        higher_is_better: whether more is better.
    """

    key: str
    heading: str
    higher_is_better: bool = False


METRICS: dict[str, tuple[Figure, ...]] = {
    "fid": (Figure("fid", "FID"),),
    "sfid": (Figure("sfid", "sFID"),),
    "kid": (Figure("kid", "KID"),),
    "is": (Figure("inception_score", "IS", higher_is_better=True),),
    "prc": (Figure("precision", "precision", higher_is_better=True), Figure("recall", "recall", higher_is_better=True)),
}
"""What ``metrics`` may say, and its figures; :data:`dcdit.evaluation.metrics.COMPUTE` has what computes each."""


def heading_of(metric: str) -> str:
    """What a metric is called, for people."""
    return " and ".join(figure.heading for figure in METRICS[metric])


def figures_of_metrics(metrics: Sequence[str]) -> list[Figure]:
    """The figures of these metrics."""
    return [figure for metric in metrics for figure in METRICS[metric]]


DropFractions = Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")]


@config
class EvaluateSettings:
    """What to measure: the keys of ``configs/evaluate.yaml`` that are not about sampling.

    Attributes:
        features: the feature network, for Hydra to build.
        reference: a folder of images, a directory of latent shards, or an ``.npz`` with images.
        metrics: some of :data:`METRICS`; None takes all that network and reference allow.
        drop_fractions: budgets to measure; None takes the one that ``guidance`` or ``budget`` says.
        uncond_drop_fractions: of the guiding branch; None takes the one that ``guidance`` says.
        search: look for the best guidance scale at each budget, with few images first.
        max_images: as many images in all as are sampled at the most; what would exceed them is not begun.
        max_hours: no chunk is begun after these.
        count: images at each budget.
        labels: which classes they are of.
        chunk_size: images of a task; what a kill loses at most, on each process.
        out: folder for the results; None takes ``evaluation`` in the run's directory.
        shown: images of the preview that is kept of each measurement.
        reference_count: take so many images of the reference, evenly spaced; None takes all.
        time_rounds: rounds in which all budgets take turns to sample a batch against the clock, at the end; 0 leaves
            the times at what they were while measuring.
        time_again: do that again for measurements that have been timed.
        cache: folder for the statistics of references; None takes one in the user's cache.
    """

    features: Any
    reference: str
    metrics: Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty(f"take some of {', '.join(METRICS)}")] | None
    drop_fractions: DropFractions | None
    uncond_drop_fractions: DropFractions | None
    search: bool
    max_images: Images | None
    max_hours: Positive | None
    count: Images
    labels: Labels
    chunk_size: Images
    out: str | None
    shown: Shown
    reference_count: Count | None
    time_rounds: Annotated[int, Bounds(0, 1000, hint="3 are enough on a quiet machine")]
    time_again: bool
    cache: str | None


@config
class EvaluateConfig(EvaluateSettings, SamplingKeys):
    """The keys of ``configs/evaluate.yaml``; of those of sampling, some take lists, see :mod:`dcdit.evaluation.grid`.

    Attributes:
        weights, sampler, guidance: as of :class:`dcdit.sampling.settings.SamplingConfig`, or with lists of values.
    """

    weights: str | list[str]
    sampler: dict[str, Any]
    guidance: dict[str, Any]
