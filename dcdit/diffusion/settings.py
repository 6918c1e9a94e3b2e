"""The keys of diffusion processes, samplers, guidance and budgets, and the tables of processes and samplers.

An entry of a table is a class of settings that names its implementation, which is imported when it is built: torch
takes seconds to import, and a mistake is to be reported at once.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dcdit.checks import Bounds, DropFraction, NotEmpty, Number, Positive, call_checked, checked, conform
from dcdit.errors import UserError

if TYPE_CHECKING:
    from dcdit.diffusion.process import Process
    from dcdit.diffusion.samplers import Stepper

TRAIN_STEPS = 1000
"""Steps of the trained process."""

Steps = Annotated[int, Bounds(1, TRAIN_STEPS, hint="the trained process has 1000 steps")]
DropSchedule = Annotated[list[list[Number]], NotEmpty("give a point, or null for a constant drop_fraction")]
Timestep = Annotated[
    int, Bounds(0, TRAIN_STEPS, hint="timesteps run from 999, of flow matching 1000, which is pure noise, to 0")
]

Weighting = Literal["none", "min_snr"]
"""Of the loss over times: ``none`` as published; ``min_snr``, min(SNR, gamma) / SNR of the noise (arXiv 2303.09556)."""


@dataclass(frozen=True)
class NamedSettings:
    """Settings that stand in a table.

    Attributes:
        name: their name in the table.
    """

    name: ClassVar[str]

    @property
    def spec(self) -> dict[str, Any]:
        """The name and all settings as plain values, as a configuration states them."""
        return {"name": self.name, **asdict(self)}


class ProcessSettings(NamedSettings):
    """The settings of a diffusion process.

    Attributes:
        name: its name in :data:`PROCESSES`.
        implementation: module and class of the :class:`dcdit.diffusion.process.Process` that is built of them.
        noisy_sampler, deterministic_sampler: names of the samplers that ``sampler=auto`` takes for it.
    """

    implementation: ClassVar[str]
    noisy_sampler: ClassVar[str]
    deterministic_sampler: ClassVar[str]

    def build(self) -> "Process":
        """The process with these settings."""
        process: Process = resolve_name(self.implementation)(self)
        return process


@checked
@dataclass(frozen=True)
class NoiseDiffusion(ProcessSettings):
    """The process of DiT and ADM, as published: 1,000 linear betas, noise prediction, learned variance.

    Attributes:
        weighting: of the squared error over timesteps.
        snr_gamma: of ``min_snr``.
    """

    name: ClassVar[str] = "ddpm"
    implementation: ClassVar[str] = "dcdit.diffusion.process:NoiseProcess"
    noisy_sampler: ClassVar[str] = "ddpm"
    deterministic_sampler: ClassVar[str] = "ddim"
    weighting: Weighting = "none"
    snr_gamma: Positive = 5.0


@checked
@dataclass(frozen=True)
class FlowMatching(ProcessSettings):
    """Flow matching on the straight line from image to noise (SiT, arXiv 2401.08740).

    Attributes:
        time: how training draws t: ``uniform``, or ``logit_normal`` (arXiv 2403.03206), more of the middle.
        time_mean, time_std: of the normal distribution of logit(t), for ``logit_normal``.
        weighting: of the squared error over t.
        snr_gamma: of ``min_snr``.
    """

    name: ClassVar[str] = "flow"
    implementation: ClassVar[str] = "dcdit.diffusion.process:FlowProcess"
    noisy_sampler: ClassVar[str] = "sde"
    deterministic_sampler: ClassVar[str] = "euler"
    time: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: Number = 0.0
    time_std: Positive = 1.0
    weighting: Weighting = "none"
    snr_gamma: Positive = 5.0


PROCESSES: dict[str, type[ProcessSettings]] = {kind.name: kind for kind in (NoiseDiffusion, FlowMatching)}
"""The processes by ``diffusion.name``."""

PUBLISHED_PROCESS = {"name": NoiseDiffusion.name}
"""The process of published weights of DC-DiT and DiT, whose files do not say it."""


CacheThreshold = Annotated[
    float, Bounds(0, 10**7, hint="it is a relative change of features, such as 0.1 or 0.2; 0 computes every step")
]


@checked
@dataclass(frozen=True)
class SamplerOptions(NamedSettings, ABC):
    """The settings that every ``sampler.name`` has, ``auto`` included.

    Attributes:
        name: its name in :data:`SAMPLERS`.
        process: ``diffusion.name`` of the networks that it fits; None for all.
        steps: number of steps, at most 1000.
        clip: clip the predicted x_0 to [-1, 1]; for images as latents, never for a VAE's.
        cache: threshold of feature caching, see :class:`dcdit.network.caching.FeatureCache`; 0 computes every step.
    """

    process: ClassVar[str | None]
    steps: Steps
    clip: bool = False
    cache: CacheThreshold = 0.0

    @property
    def description(self) -> str:
        """The sampler, its steps and its cache threshold, such as ``ddim 50 steps``."""
        caching = f", cache {self.cache:.3g}" if self.cache else ""
        return f"{self.name} {self.steps} steps{caching}"

    @abstractmethod
    def for_process(self, process: ProcessSettings) -> "SamplerSettings":
        """The sampler for networks that were trained by ``process``; :class:`UserError` if it does not fit them."""


class SamplerSettings(SamplerOptions):
    """The settings of one sampler.

    Attributes:
        steps, clip, cache: as of :class:`SamplerOptions`.
        implementation: module and class of the :class:`dcdit.diffusion.samplers.Stepper` that is built of them.
    """

    implementation: ClassVar[str]

    def stepper(self) -> "Stepper":
        """A new object that makes the steps of one trajectory."""
        stepper: Stepper = resolve_name(self.implementation)(self)
        return stepper

    def for_process(self, process: ProcessSettings) -> "SamplerSettings":
        """This sampler; :class:`UserError` unless it is one for networks that were trained by ``process``."""
        if self.process != process.name:
            raise UserError(
                f"sampler={self.name} does not fit a network that was trained with diffusion={process.name}:"
                f" take sampler={', '.join(['auto', *samplers_of(process.name)])}"
            )
        return self


@checked
@dataclass(frozen=True)
class DDPM(SamplerSettings):
    """Ancestral sampling with the learned range variance; steps evenly spaced over 0..999, both ends included.

    Attributes:
        steps, clip, cache: see there.
    """

    name: ClassVar[str] = "ddpm"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:AncestralStepper"
    process: ClassVar[str] = "ddpm"


@checked
@dataclass(frozen=True)
class DDIM(SamplerSettings):
    """Implicit sampling (DDIM); steps spaced as the reference implementation does, from 0 upwards.

    Attributes:
        steps, clip, cache: see there.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
    """

    name: ClassVar[str] = "ddim"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:ImplicitStepper"
    process: ClassVar[str] = "ddpm"
    eta: Annotated[float, Bounds(0, 1, hint="0 is deterministic DDIM, 1 is as noisy as DDPM")] = 0.0


@checked
@dataclass(frozen=True)
class DPMSolver(SamplerSettings):
    """Second-order multistep DPM-Solver++ (arXiv 2211.01095): evenly spaced, deterministic.

    Attributes:
        steps, clip, cache: see there.
    """

    name: ClassVar[str] = "dpm++"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:MultistepStepper"
    process: ClassVar[str] = "ddpm"
    steps: Annotated[
        int,
        Bounds(
            1, TRAIN_STEPS - 1, hint="between 1000 timesteps there are 999 intervals, and one of no length has no slope"
        ),
    ]


TimeShift = Annotated[float, Bounds(0, 10**7, open_low=True, hint="1 is even steps, 3 spends more of them among noise")]


@checked
@dataclass(frozen=True)
class Euler(SamplerSettings):
    """Euler's method for the ODE of flow matching: first order, one evaluation a step.

    Attributes:
        steps, clip, cache: see there.
        shift: s of t' = s t / (1 + (s - 1) t) (arXiv 2403.03206), on evenly spaced t from 1 to 0.
    """

    name: ClassVar[str] = "euler"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:EulerStepper"
    process: ClassVar[str] = "flow"
    shift: TimeShift = 1.0


@checked
@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method for the ODE of flow matching: second order, two evaluations a step but for the last.

    Attributes:
        steps, clip, cache, shift: as of :class:`Euler`.
    """

    name: ClassVar[str] = "heun"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:HeunStepper"


@checked
@dataclass(frozen=True)
class EulerMaruyama(Euler):
    """The SDE of flow matching by Euler and Maruyama, diffusion coefficient t (SiT, arXiv 2401.08740).

    Attributes:
        steps, clip, cache, shift: as of :class:`Euler`.
        last: t from which the last step goes to 0 at once, without noise.
    """

    name: ClassVar[str] = "sde"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:EulerMaruyamaStepper"
    steps: Annotated[int, Bounds(2, TRAIN_STEPS, hint="the SDE takes 250 as published, and two at the least")]
    last: Annotated[float, Bounds(0, 1, open_low=True, open_high=True, hint="0.04 as published")] = 0.04


@checked
@dataclass(frozen=True)
class Auto(SamplerOptions):
    """The usual sampler of whatever process a network was trained by: with noise DDPM or the SDE, else DDIM or Euler.

    Attributes:
        steps, clip, cache: as of these.
        noise: whether noise is added at every step.
    """

    name: ClassVar[str] = "auto"
    process: ClassVar[str | None] = None
    noise: bool = True

    def for_process(self, process: ProcessSettings) -> SamplerSettings:
        """The usual sampler of ``process``, with these steps, clipping and caching."""
        name = process.noisy_sampler if self.noise else process.deterministic_sampler
        values = {"steps": self.steps, "clip": self.clip, "cache": self.cache}
        sampler = call_checked(SAMPLERS[name], values, "sampler")  # whose bounds are its own
        return sampler.for_process(process)


SAMPLERS: dict[str, type[SamplerOptions]] = {
    kind.name: kind for kind in (Auto, DDPM, DDIM, DPMSolver, Euler, Heun, EulerMaruyama)
}
"""The samplers by ``sampler.name``."""


def samplers_of(process: str) -> list[str]:
    """Names of the samplers for networks that were trained with this ``diffusion.name``."""
    return [name for name, kind in SAMPLERS.items() if kind.process == process]


@checked
@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance of a main branch by a weaker, guiding one: without class (classifier-free), at a smaller budget, or of
    another checkpoint.

    Attributes:
        scale: guidance scale; 1 runs the main branch alone.
        channels: guided noise channels, at most all; None takes 3 of 4, as all published figures, and else all.
        drop_fraction: tail drop of the main branch.
        uncond_drop_fraction: tail drop of the guiding branch (Lite-CFG); None takes the same.
        weak: ``uncond``, the guiding branch knows no class; ``budget``, it knows the class and drops more tokens. None
            takes ``uncond``, and with ``weak_checkpoint`` the same class.
        weak_checkpoint: the checkpoint of the guiding branch, see ``resolve_checkpoint``; None for the
            network itself.
        interval: lowest and highest timestep that is guided (arXiv 2404.07724); elsewhere the main branch runs
            alone. None guides all.
        drop_schedule: pairs of timestep and drop fraction, linear in between, constant beyond; in place of
            ``drop_fraction``.

    Raises:
        UserError: if a value is out of its range.
    """

    scale: Annotated[float, Bounds(0, 10**7, hint="1 is no guidance, 4 is strong")] = 1.0
    channels: Annotated[int, Bounds(1, 10**7, hint="take 3 as published, or as many as there are")] | None = None
    drop_fraction: DropFraction = 0.0
    uncond_drop_fraction: DropFraction | None = None
    weak: Literal["uncond", "budget"] | None = None
    weak_checkpoint: str | None = None
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
        if self.scale != 1 and self.weak == "budget" and self.guiding_equals_main:
            raise UserError(
                f"weak=budget: the guiding branch would drop {self.uncond_drop_fraction or 0:g} of the tokens, no"
                " more than the main branch, and guide nowhere: give guidance.uncond_drop_fraction, such as 0.9"
            )

    @property
    def canonical(self) -> "GuidanceSettings":
        """Equivalent settings in one form: no guiding branch where none runs, and its drop fraction where one does."""
        if self.scale == 1:
            return replace(self, uncond_drop_fraction=None, weak=None, weak_checkpoint=None)
        if self.uncond_drop_fraction is None and self.drop_schedule is None:
            return replace(self, uncond_drop_fraction=self.drop_fraction)
        return self

    @property
    def guiding_keeps_class(self) -> bool:
        """Whether the guiding branch knows the class."""
        return self.weak == "budget" or (self.weak is None and self.weak_checkpoint is not None)

    @property
    def guiding_equals_main(self) -> bool:
        """Whether nothing makes the guiding branch weaker than the main one."""
        least = min(self.main_drop_fractions)
        same_budget = self.uncond_drop_fraction is None or self.uncond_drop_fraction <= least
        return self.guiding_keeps_class and self.weak_checkpoint is None and same_budget

    def guided_channels(self, channels: int) -> int:
        """How many of the ``channels`` of the latents are guided."""
        return min(self.channels or (3 if channels == 4 else channels), channels)

    def is_guided(self, timestep: float) -> bool:
        """Whether the guiding branch runs too at ``timestep``."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return self.scale != 1 and inside

    def drop_at(self, timestep: float) -> tuple[float, float]:
        """Tail drop of the main and of the guiding branch at ``timestep``."""
        drop = self.drop_fraction
        if self.drop_schedule is not None:
            import numpy as np

            points = sorted(self.drop_schedule)
            drop = float(np.interp(timestep, [point[0] for point in points], [point[1] for point in points]))
        return drop, drop if self.uncond_drop_fraction is None else self.uncond_drop_fraction

    @property
    def main_drop_fractions(self) -> list[float]:
        """Drop fractions of the main branch, between which all others lie."""
        return [self.drop_fraction] if self.drop_schedule is None else [point[1] for point in self.drop_schedule]


@checked
@dataclass(frozen=True)
class BudgetSettings:
    """A budget as a person thinks of it; at most one of the two.

    Attributes:
        tflops: TFLOPs per image, all steps and branches, residual projection included.
        fraction: share of what an image costs without any drop or reuse.
        by: what meets it: the drop fraction, the threshold of feature caching, or both; None takes both where the
            network caches and no threshold is given.
    """

    tflops: Positive | None = None
    fraction: Annotated[float, Bounds(0, 1, open_low=True, hint="0.6 asks for 60% of the full cost")] | None = None
    by: Literal["drop", "cache", "both"] | None = None

    def __post_init__(self) -> None:
        if self.tflops is not None and self.fraction is not None:
            raise UserError(f"tflops={self.tflops} and fraction={self.fraction} are two budgets: give one of them")

    @property
    def given(self) -> bool:
        """Whether there is a budget to meet."""
        return self.tflops is not None or self.fraction is not None
