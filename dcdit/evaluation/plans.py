"""What the figures of images depend on: how the images were sampled, and what they were compared with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Self

from dcdit.checks import (
    Capacity,
    Count,
    Matches,
    Natural,
    NotEmpty,
    OneOf,
    Seed,
    build_named,
    call_checked,
    conform,
)
from dcdit.data.latents import IDENTITY
from dcdit.diffusion.settings import SAMPLERS, GuidanceSettings, SamplerOptions
from dcdit.evaluation.settings import METRICS

Text = Annotated[str, Matches("(?s).{0,4096}", "a text of at most 4,096 characters")]


@dataclass(frozen=True)
class FeatureDescription:
    """What features depend on beside the images.

    Attributes:
        weights: digest of the feature network's weights.
        resize: description of how images come to the size that the network sees.
        code: digest of the file of the network's class, for a network of the user's own.
    """

    name: Text
    weights: Text | None
    num_features: Natural
    resize: Text
    code: Text | None = None


@dataclass(frozen=True)
class ReferenceDescription:
    """What generated images were compared with.

    Attributes:
        images: which images they are, see :meth:`dcdit.evaluation.image_set.ImageSet.described`.
        count: how many of them were read.
        published: which statistics came with the images.
    """

    images: dict[str, Any]
    features: FeatureDescription
    count: Natural
    published: list[Literal["features", "spatial"]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What images were compared with, and how.

    Attributes:
        count: number of images.
        metrics: names of the metrics.
    """

    count: Count
    features: FeatureDescription
    reference: ReferenceDescription
    metrics: Annotated[list[Annotated[str, OneOf(METRICS)]], NotEmpty("it measures nothing")]


@dataclass(frozen=True, kw_only=True)
class SampledPlan:
    """Everything that sampled images depend on.

    Attributes:
        step: optimiser steps trained; None where the checkpoint does not say.
        weights: EMA weights, raw ones, or an average of another length.
        seed: of labels and noise.
        guidance: ``weak_checkpoint`` ends with the digest of the checkpoint.
        rounding: of pixels, on the way to 0..255.
        checkpoint: digest of the weights.
        labels: how the classes were chosen.
        capacity: room of the forward passes, as a share of all positions, or ``auto`` and a digest of the shares.
    """

    step: Natural | None
    weights: Text
    seed: Seed
    precision: Text
    sampler: SamplerOptions
    guidance: GuidanceSettings
    autoencoder: Text
    rounding: Text
    checkpoint: Text
    labels: Text
    batch_size: Count
    capacity: Capacity | Text | None = None

    def __post_init__(self) -> None:
        conform("guidance.weak_checkpoint", self.guidance.weak_checkpoint, Text | None)

    @property
    def undecoded(self) -> str:
        """What the images are instead of decoded pictures, such as channels of latents; empty for pictures."""
        name, _, undecoded = self.autoencoder.partition(": ")
        return undecoded if name == IDENTITY else ""

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return the plan in plain values; raise :class:`UserError` naming the key of a wrong one."""
        values = conform("plan", values, dict[str, Any])
        sampler = build_named(SAMPLERS, values.pop("sampler", None), "plan.sampler")
        return call_checked(cls, values, "plan", {"sampler": sampler})

    def as_plain(self) -> dict[str, Any]:
        """Return the plain values that a file holds."""
        plan = {**asdict(self), "sampler": self.sampler.spec}
        if plan["capacity"] is None:
            del plan["capacity"]
        return plan


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan(Comparison, SampledPlan):
    """Everything that the figures of a result depend on."""


def ema_decay(training: Mapping[str, Any], weights: str) -> float | None:
    """Return the decay of the EMA that ``weights`` are of; None for other weights, or where nobody says it."""
    ema = training.get("ema")
    decay = ema.get("decay") if isinstance(ema, Mapping) and weights == "ema" else None
    return decay if isinstance(decay, float) else None
