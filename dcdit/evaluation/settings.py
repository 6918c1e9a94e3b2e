"""What a user may say to ``dcdit.evaluate``, and what metrics are called. No torch, so that mistakes show at once."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from dcdit.checks import Count, DropFraction, Images, Natural, NotEmpty, OneOf, checked
from dcdit.sampling.settings import Labels


class MetricName(NamedTuple):
    """What a metric is called.

    Attributes:
        key: of the metric itself in results.
        heading: in tables and plots.
    """

    key: str
    heading: str


METRICS = {
    "fid": MetricName("fid_torch", "FID"),
    "kid": MetricName("kid", "KID"),
    "is": MetricName("inception_score", "IS"),
}
"""What ``metrics`` may say; :data:`dcdit.evaluation.metrics.COMPUTE` has what computes each."""


@checked
@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure: the keys of ``configs/evaluate.yaml`` that are not about sampling.

    Attributes:
        features: the feature network, for Hydra to build.
        reference: a folder of images, a directory of latent shards, or an ``.npz`` with images.
        metrics: some of :data:`METRICS`.
        drop_fractions: budgets to measure; None takes the one that ``guidance`` or ``budget`` says.
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
    metrics: Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty(f"take some of {', '.join(METRICS)}")]
    drop_fractions: Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")] | None
    count: Images
    labels: Labels
    chunk_size: Images
    out: str | None
    shown: Images
    reference_count: Count | None
    time_rounds: Natural
    time_again: bool
    cache: str | None
