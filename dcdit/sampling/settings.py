"""What a user may say to every command that samples from a checkpoint. No torch here, so that mistakes show at once."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from dcdit.checkpoints.settings import AssumeSettings, Paths, WeightsKind
from dcdit.checks import (
    FLOAT_NAMES,
    Bounds,
    Capacity,
    Images,
    Named,
    Natural,
    NotEmpty,
    Seed,
    TailDrop,
    annotations,
    call_checked,
    config,
)
from dcdit.data.latents import Rounding
from dcdit.diffusion.settings import SAMPLERS, BudgetSettings, GuidanceScale, GuidanceSettings, SamplerOptions, Steps
from dcdit.errors import UserError

Labels = Literal["random", "balanced"]
"""``random``: each image's class is drawn from the seed and its number, as for published figures. ``balanced``: the
classes take turns; FIDs come out about 0.1 lower (ImageNet)."""


Classes = Annotated[list[Natural | str], NotEmpty("name at least one class")]
"""Labels or names of classes."""


@config
class SamplingKeys:
    """The keys of ``configs/sampling/default.yaml`` that have one value, whatever a command makes of the others."""

    checkpoint: str
    seed: Seed
    batch_size: Images
    device: str
    precision: Annotated[Literal["auto", "fp32", "bf16"], FLOAT_NAMES]
    autoencoder: str | None
    rounding: Rounding
    compile: Literal["auto"] | bool
    capacity: Literal["auto"] | Capacity | None
    assume: AssumeSettings
    budget: BudgetSettings
    paths: Paths


@config
class SamplingConfig(SamplingKeys):
    """All keys of ``configs/sampling/default.yaml``; UserError naming key, value and remedy."""

    weights: WeightsKind
    sampler: Annotated[SamplerOptions, Named(SAMPLERS)]
    guidance: GuidanceSettings

    def __post_init__(self) -> None:
        by, guidance = self.budget.by, self.guidance
        if by is not None and not self.budget.given:
            raise UserError(f"budget.by={by} meets no budget: give budget.fraction or budget.tflops")
        if self.budget.given and (guidance.drop_schedule is not None or (by != "cache" and guidance.drop_fraction)):
            raise UserError("budget: guidance.drop_fraction and drop_schedule are what it replaces, leave them out")
        if by in ("cache", "both") and self.sampler.cache:
            raise UserError(f"budget.by={by}: sampler.cache is what it replaces, leave it out")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SamplingConfig":
        """Return the configuration in plain values, others ignored; raise UserError naming key, value and remedy."""
        names = annotations(SamplingConfig)
        return call_checked(SamplingConfig, {key: value for key, value in values.items() if key in names}, "")


@config
class ExamplesSettings:
    """The images that ``dcdit export`` samples for a model card; ``configs/export.yaml`` describes each key."""

    columns: Annotated[int, Bounds(0, 16, hint="a card shows few images; 0 is none")]
    steps: Steps
    guidance_scale: GuidanceScale
    drop_fractions: Annotated[list[TailDrop], NotEmpty("take [0.0] for the full budget alone")]
