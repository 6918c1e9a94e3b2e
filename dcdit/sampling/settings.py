"""What a user may say to every command that samples from a checkpoint. No torch here, so that mistakes show at once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from dcdit.checkpoints.settings import AssumeSettings, WeightsKind
from dcdit.checks import Images, Seed, build_named, call_checked, checked
from dcdit.data.latents import Rounding
from dcdit.diffusion.settings import SAMPLERS, BudgetSettings, GuidanceSettings, SamplerOptions
from dcdit.errors import UserError

Labels = Literal["random", "balanced"]
"""``random``: each image's class is drawn from the seed and its number, as for published figures. ``balanced``: the
classes take turns; FIDs come out about 0.1 lower (ImageNet)."""

SECTIONS = ("assume", "sampler", "guidance", "budget", "paths")


@checked
@dataclass(frozen=True)
class SamplingSettings:
    """Keys at the top of ``configs/sampling/default.yaml``.

    Attributes:
        checkpoint: what names the weights, see ``resolve_checkpoint``.
        weights: EMA weights, raw ones, or an average of another length, see :data:`WeightsKind`.
        seed: with a sample's number, the only source of randomness.
        batch_size: samples per forward pass; changes the speed, and the images by no more than rounding.
        device: ``auto`` or a torch device.
        precision: ``auto`` takes bf16 on a GPU, fp32 elsewhere.
        autoencoder: decode with this one; None takes the one that the checkpoint names.
        rounding: of pixels, on the way to 0..255.
        compile: fuse the element-wise operations of the blocks.
    """

    checkpoint: str
    weights: WeightsKind
    seed: Seed
    batch_size: Images
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    autoencoder: str | None
    rounding: Rounding
    compile: bool


@dataclass(frozen=True)
class SamplingPlan:
    """All that is said about sampling, checked as far as that goes without the checkpoint.

    Attributes:
        settings: what holds whatever is sampled.
        assume: what a checkpoint of another program cannot say.
        sampler, guidance, budget: the sections of those names.
        runs: folder of all runs.
    """

    settings: SamplingSettings
    assume: AssumeSettings
    sampler: SamplerOptions
    guidance: GuidanceSettings
    budget: BudgetSettings
    runs: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> tuple["SamplingPlan", dict[str, Any]]:
        """The plan in the plain values of a composed configuration, and the values that are the command's own.

        Raises:
            UserError: naming key, value and remedy.
        """
        names = {column.name for column in fields(SamplingSettings)}
        own = {key: value for key, value in values.items() if key not in names and key not in SECTIONS}
        # What is wrong is told before what is missing.
        sampler = build_named(SAMPLERS, values.get("sampler"), "sampler")
        guidance = call_checked(GuidanceSettings, values.get("guidance"), "guidance")
        budget = call_checked(BudgetSettings, values.get("budget"), "budget")
        assume = call_checked(AssumeSettings, values.get("assume"), "assume")
        settings = call_checked(SamplingSettings, {key: values[key] for key in values if key in names}, "")
        plan = cls(settings, assume, sampler, guidance, budget, str(values["paths"]["runs"]))
        by = plan.budget.by
        if by is not None and not plan.budget.given:
            raise UserError(f"budget.by={by} meets no budget: give budget.fraction or budget.tflops")
        dropped = plan.guidance.drop_schedule is not None or (by != "cache" and plan.guidance.drop_fraction)
        if plan.budget.given and dropped:
            raise UserError("budget: guidance.drop_fraction and drop_schedule are what it replaces, leave them out")
        if by in ("cache", "both") and plan.sampler.cache:
            raise UserError(f"budget.by={by}: sampler.cache is what it replaces, leave it out")
        return plan, own
