"""The keys of ``dcdit.evaluate`` and ``dcdit.score``, and the table of metrics.

Imports no torch, so that mistakes show at once.
"""

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from dcdit.checks import (
    Bounds,
    Count,
    DropFraction,
    Images,
    NotEmpty,
    Number,
    OneOf,
    Positive,
    Shown,
    Table,
    config,
    suggestion,
)
from dcdit.data.latents import Rounding
from dcdit.data.manifest import MAX_SIDE
from dcdit.errors import UserError
from dcdit.sampling.settings import Labels, SamplingKeys

T = TypeVar("T")


class Figure(NamedTuple):
    """A number that a metric gives.

    Attributes:
        key: its name in results.
        heading: its name in tables and plots.
        higher_is_better: whether more is better.
    """

    key: str
    heading: str
    higher_is_better: bool = False

    def best(self, values: Iterable[T], key: Callable[[T], float]) -> T:
        """Return the first value whose figure, which ``key`` tells, is the best."""
        return (max if self.higher_is_better else min)(values, key=key)


@dataclass(frozen=True)
class Metric:
    """A metric: its figures, the function that computes them, and what that needs.

    Attributes:
        figures: the numbers that it gives.
        compute: ``module:function``, imported when it is first needed, or a function: from the
            :class:`dcdit.evaluation.statistics.Statistics` of the reference and the
            :data:`dcdit.evaluation.metrics.Chunks` of the generated images to numbers by key, those of the figures
            among them.
        reference: which part of the reference it needs: ``images``, or statistics of ``features`` or ``spatial`` ones.
        logits: whether the feature network must give class logits.
        least: the number of images must be greater than this, beside what a covariance needs.
    """

    figures: tuple[Figure, ...]
    compute: str | Callable[..., dict[str, float]]
    reference: Literal["images", "features", "spatial"] | None = "images"
    logits: bool = False
    least: int = 1

    def function(self) -> Callable[..., dict[str, float]]:
        """Return what computes the figures, imported if need be."""
        if not isinstance(self.compute, str):
            return self.compute
        function: Callable[..., dict[str, float]] = pkgutil.resolve_name(self.compute)
        return function


NEIGHBOURS = 3
"""k of precision and recall, as the ADM suite has it."""

_COMPUTE = "dcdit.evaluation.metrics:compute_"

METRICS: Table[Metric] = Table(
    "metrics",
    {
        "fid": Metric((Figure("fid", "FID"),), f"{_COMPUTE}fid", "features"),
        "sfid": Metric((Figure("sfid", "sFID"),), f"{_COMPUTE}sfid", "spatial"),
        "kid": Metric((Figure("kid", "KID"),), f"{_COMPUTE}kid"),
        "is": Metric((Figure("inception_score", "IS", True),), f"{_COMPUTE}inception_score", None, logits=True),
        "prc": Metric(
            (Figure("precision", "precision", True), Figure("recall", "recall", True)),
            f"{_COMPUTE}precision_recall",
            least=NEIGHBOURS,
        ),
    },
)
"""What ``metrics`` may say."""


def heading_of(metric: str) -> str:
    """Return what a metric is called in messages."""
    return " and ".join(figure.heading for figure in METRICS[metric].figures)


def figures_of_metrics(metrics: Sequence[str]) -> list[Figure]:
    """Return the figures of these metrics."""
    return [figure for metric in metrics for figure in METRICS[metric].figures]


DropFractions = Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")]


@config
class ComparisonSettings:
    """What images are compared with, and how: keys of ``configs/evaluate.yaml`` and ``configs/score.yaml``."""

    features: Any
    reference: str
    metrics: Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty(f"take some of {', '.join(METRICS)}")] | None
    chunk_size: Images
    out: str | None
    reference_count: Count | None
    cache: str | None


@config
class ScoreConfig(ComparisonSettings):
    """The configuration of ``dcdit.score``; ``configs/score.yaml`` describes each key."""

    images: str
    count: Images | None
    image_size: Annotated[int, Bounds(1, MAX_SIDE, hint="it is a number of pixels")] | None
    expected: dict[str, Number] | None
    batch_size: Images
    device: str
    autoencoder: str | None
    rounding: Rounding

    def __post_init__(self) -> None:
        figures = {figure.key for figure in figures_of_metrics(self.metrics or list(METRICS))}
        for key in self.expected or ():
            if key not in figures:
                raise UserError(f"expected.{key}: {key} is no figure that is computed, {suggestion(key, figures)}")


@config
class EvaluateSettings(ComparisonSettings):
    """What to measure: the keys of ``configs/evaluate.yaml`` that are not about sampling, explained there."""

    drop_fractions: DropFractions | None
    uncond_drop_fractions: DropFractions | None
    search: bool
    max_images: Images | None
    max_hours: Positive | None
    count: Images
    labels: Labels
    shown: Shown
    time_rounds: Annotated[int, Bounds(0, 1000, hint="3 are enough on a quiet machine")]
    time_again: bool


@config
class EvaluateConfig(EvaluateSettings, SamplingKeys):
    """The keys of ``configs/evaluate.yaml``; of those of sampling, some take lists, see :mod:`dcdit.evaluation.grid`.

    Attributes:
        weights, sampler, guidance: as of :class:`dcdit.sampling.settings.SamplingConfig`, or with lists of values.
    """

    weights: str | list[str]
    sampler: dict[str, Any]
    guidance: dict[str, Any]
