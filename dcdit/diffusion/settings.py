"""What a user may say about sampling. No torch here, so that mistakes show at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from dcdit.checks import Bounds, DropFraction, NotEmpty, checked, conform
from dcdit.errors import UserError

TRAIN_STEPS = 1000
"""Steps of the trained process."""

Steps = Annotated[int, Bounds(1, TRAIN_STEPS, hint="the trained process has 1000 steps")]
DropSchedule = Annotated[list[list[float]], NotEmpty("give a point, or null for a constant drop_fraction")]
Timestep = Annotated[int, Bounds(0, TRAIN_STEPS - 1, hint="timesteps run from 999, pure noise, to 0")]


@checked
@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling with the learned range variance; steps evenly spaced over 0..999, both ends included.

    Attributes:
        steps: number of steps, at most 1000.
        clip: clip the predicted x_0 to [-1, 1]; for images as latents, never for a VAE's.
    """

    name: ClassVar[str] = "ddpm"
    steps: Steps
    clip: bool = False


@checked
@dataclass(frozen=True)
class DDIM:
    """Implicit sampling (DDIM); steps spaced as the reference implementation does, from 0 upwards.

    Attributes:
        steps, clip: as of :class:`DDPM`.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
    """

    name: ClassVar[str] = "ddim"
    steps: Steps
    clip: bool = False
    eta: Annotated[float, Bounds(0, 1, hint="0 is deterministic DDIM, 1 is as noisy as DDPM")] = 0.0


@checked
@dataclass(frozen=True)
class DPMSolver:
    """Second-order multistep DPM-Solver++ (arXiv 2211.01095): evenly spaced, deterministic.

    Attributes:
        steps, clip: as of :class:`DDPM`.
    """

    name: ClassVar[str] = "dpm++"
    steps: Steps
    clip: bool = False


SamplerSettings = DDPM | DDIM | DPMSolver

SAMPLERS: dict[str, Callable[..., SamplerSettings]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMSolver}
"""What ``sampler.name`` may say; :data:`dcdit.diffusion.samplers.STEPPERS` has what runs for each."""


@checked
@dataclass(frozen=True)
class GuidanceSettings:
    """Classifier-free guidance, with its own budget for each half (Lite-CFG).

    Attributes:
        scale: guidance scale; 1 runs the conditional half alone.
        channels: guided noise channels, None for all. The published numbers guided 3 of 4.
        drop_fraction: tail drop of the conditional half.
        uncond_drop_fraction: tail drop of the unconditional half; None takes the same.
        interval: lowest and highest timestep that is guided (arXiv 2404.07724); elsewhere the conditional half runs
            alone. None guides all.
        drop_schedule: pairs of timestep and drop fraction, linear in between, constant beyond; in place of
            ``drop_fraction``.

    Raises:
        UserError: if a value is out of its range.
    """

    scale: Annotated[float, Bounds(low=0, hint="1 is no guidance, 4 is strong")] = 1.0
    channels: Annotated[int, Bounds(low=1, hint="take 3 as published, or null for all")] | None = 3
    drop_fraction: DropFraction = 0.0
    uncond_drop_fraction: DropFraction | None = None
    interval: list[Timestep] | None = None
    drop_schedule: DropSchedule | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and (len(self.interval) != 2 or self.interval[0] > self.interval[1]):
            raise UserError(f"interval={self.interval} is no pair of lowest and highest timestep, such as [100, 700]")
        for point in self.drop_schedule or []:
            if len(point) != 2:
                raise UserError(f"drop_schedule={self.drop_schedule}: {point} is no pair of timestep and drop fraction")
            conform("drop_schedule", point[0], Timestep)
            conform("drop_schedule", point[1], DropFraction)

    def is_guided(self, timestep: int) -> bool:
        """Whether both halves run at ``timestep``."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return self.scale != 1 and inside

    def drop_at(self, timestep: int) -> tuple[float, float]:
        """Tail drop of the conditional and of the unconditional half at ``timestep``."""
        drop = self.drop_fraction
        if self.drop_schedule is not None:
            import numpy as np

            points = sorted(self.drop_schedule)
            drop = float(np.interp(timestep, [point[0] for point in points], [point[1] for point in points]))
        return drop, drop if self.uncond_drop_fraction is None else self.uncond_drop_fraction

    @property
    def drops(self) -> list[float]:
        """All drop fractions that may occur, for whoever refuses them."""
        timesteps = {0, TRAIN_STEPS - 1, *(int(point[0]) for point in self.drop_schedule or [])}
        return [drop for timestep in sorted(timesteps) for drop in self.drop_at(timestep)]


@checked
@dataclass(frozen=True)
class BudgetSettings:
    """A budget as a person thinks of it; at most one of the two.

    Attributes:
        tflops: TFLOPs per image, all steps and halves, residual projection included.
        fraction: share of what an image costs without any drop.
    """

    tflops: Annotated[float, Bounds(low=0, open_low=True)] | None = None
    fraction: Annotated[float, Bounds(0, 1, open_low=True, hint="0.6 asks for 60% of the full cost")] | None = None

    def __post_init__(self) -> None:
        if self.tflops is not None and self.fraction is not None:
            raise UserError(f"tflops={self.tflops} and fraction={self.fraction} are two budgets: give one of them")

    @property
    def given(self) -> bool:
        """Whether there is a budget to meet."""
        return self.tflops is not None or self.fraction is not None
