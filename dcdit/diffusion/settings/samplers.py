"""The settings of samplers, and the table of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from typing_extensions import override

from dcdit.checks import Bounds, NamedSettings, Table, call_checked, checked
from dcdit.diffusion.settings.processes import (
    TRAIN_STEPS,
    FlowMatching,
    ProcessSettings,
    TimeShift,
)
from dcdit.errors import UserError

if TYPE_CHECKING:
    from dcdit.diffusion.samplers import Stepper

Steps = Annotated[int, Bounds(1, TRAIN_STEPS, hint="the trained process has 1000 steps")]


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
        implementation: a :class:`dcdit.diffusion.samplers.Stepper`.
    """

    def stepper(self) -> "Stepper":
        """A new object that makes the steps of one trajectory."""
        stepper: Stepper = self.call_implementation()
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
    """Ancestral sampling with the learned range variance; steps evenly spaced over 0..999, both ends included."""

    name: ClassVar[str] = "ddpm"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:AncestralStepper"
    process: ClassVar[str] = "ddpm"


@checked
@dataclass(frozen=True)
class DDIM(SamplerSettings):
    """Implicit sampling (DDIM); steps spaced as the reference implementation does, from 0 upwards.

    Attributes:
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
    """

    name: ClassVar[str] = "ddim"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:ImplicitStepper"
    process: ClassVar[str] = "ddpm"
    eta: Annotated[float, Bounds(0, 1, hint="0 is deterministic DDIM, 1 is as noisy as DDPM")] = 0.0


@checked
@dataclass(frozen=True)
class DPMSolver(SamplerSettings):
    """Second-order multistep DPM-Solver++ (arXiv 2211.01095): evenly spaced, deterministic."""

    name: ClassVar[str] = "dpm++"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:MultistepStepper"
    process: ClassVar[str] = "ddpm"
    steps: Annotated[
        int,
        Bounds(
            1, TRAIN_STEPS - 1, hint="between 1000 timesteps there are 999 intervals, and one of no length has no slope"
        ),
    ]


@checked
@dataclass(frozen=True)
class Euler(SamplerSettings):
    """Euler's method for the ODE of flow matching: first order, one evaluation a step.

    Attributes:
        shift: of evenly spaced t from 1 to 0; None takes that of the process that the network was trained by.
    """

    name: ClassVar[str] = "euler"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:EulerStepper"
    process: ClassVar[str] = "flow"
    shift: TimeShift | None = None

    @override
    def for_process(self, process: ProcessSettings) -> SamplerSettings:
        super().for_process(process)
        if self.shift is None and isinstance(process, FlowMatching) and process.shift != "auto":
            return replace(self, shift=process.shift)
        return self


@checked
@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method for the ODE of flow matching: second order, two evaluations a step but for the last."""

    name: ClassVar[str] = "heun"
    implementation: ClassVar[str] = "dcdit.diffusion.samplers:HeunStepper"


@checked
@dataclass(frozen=True)
class EulerMaruyama(Euler):
    """The SDE of flow matching by Euler and Maruyama, diffusion coefficient t (SiT, arXiv 2401.08740).

    Attributes:
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


SAMPLERS: Table[type[SamplerOptions]] = Table(
    "sampler.name", {kind.name: kind for kind in (Auto, DDPM, DDIM, DPMSolver, Euler, Heun, EulerMaruyama)}
)
"""The samplers by ``sampler.name``."""


def samplers_of(process: str) -> list[str]:
    """Names of the samplers for networks that were trained with this ``diffusion.name``."""
    return [name for name, kind in SAMPLERS.items() if kind.process == process]
