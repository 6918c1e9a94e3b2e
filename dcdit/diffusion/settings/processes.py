"""The settings of diffusion processes, and the table of them."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from typing_extensions import Self, override

from dcdit.checks import Bounds, NamedSettings, NonNegative, Number, OneOf, Positive, Table, checked

if TYPE_CHECKING:
    from dcdit.diffusion.process import Process


TRAIN_STEPS = 1000
"""Steps of the trained process."""


WEIGHTINGS: Table[str | None] = Table(
    "diffusion.weighting", {"none": None, "min_snr": "dcdit.diffusion.loss:min_snr_weight"}
)
"""What ``diffusion.weighting`` may say: module and function of the weight of a sample's squared error.

The function takes the signal-to-noise ratio (B,), the squared error of x_0 that an error of 1 in the network's
prediction stands for (B,), and ``snr_gamma``; it returns (B,). ``none``, as published, weighs all times alike."""

Weighting = Annotated[str, OneOf(WEIGHTINGS)]

TimeShift = Annotated[float, Bounds(0, 10**7, open_low=True, hint="1 is no shift, 3 spends more of the times on noise")]
"""s of t' = s t / (1 + (s - 1) t) (arXiv 2403.03206), see :func:`dcdit.diffusion.schedule.shift_times`."""

_UNSHIFTED_ELEMENTS = 4096
"""Elements of a latent, 32 x 32 x 4, that need no shift of times (RAE, arXiv 2510.11690)."""


class ProcessSettings(NamedSettings):
    """The settings of a diffusion process.

    Attributes:
        name: its name in :data:`PROCESSES`.
        implementation: a :class:`dcdit.diffusion.process.Process`.
        noisy_sampler, deterministic_sampler: names of the samplers that ``sampler=auto`` takes for it.
        weighting: of the squared error over times, see :data:`WEIGHTINGS`.
        snr_gamma: argument of the weighting.
    """

    noisy_sampler: ClassVar[str]
    deterministic_sampler: ClassVar[str]
    weighting: Weighting
    snr_gamma: float

    def build(self) -> "Process":
        """The process with these settings."""
        process: Process = self.call_implementation()
        return process

    def for_latents(self, elements: int) -> Self:
        """These settings, with the values that ``auto`` stands for, for latents of C * H * W ``elements``."""
        return self


@checked
@dataclass(frozen=True)
class NoiseDiffusion(ProcessSettings):
    """The process of DiT and ADM, as published: 1,000 linear betas, noise prediction, learned variance."""

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
        shift: of the times of training, and of sampling unless a sampler has its own; ``auto`` is the square root of
            elements of a latent / 4096.
        prediction: what the network predicts: ``velocity``, or ``x``, the image (JiT, arXiv 2511.13720).
        velocity_cosine: weight of 1 - cos(v', v) beside the squared error of the velocity v' (arXiv 2501.01423).
    """

    name: ClassVar[str] = "flow"
    implementation: ClassVar[str] = "dcdit.diffusion.process:FlowProcess"
    noisy_sampler: ClassVar[str] = "sde"
    deterministic_sampler: ClassVar[str] = "euler"
    time: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: Number = 0.0
    time_std: Positive = 1.0
    shift: Literal["auto"] | TimeShift = 1.0
    prediction: Literal["velocity", "x"] = "velocity"
    velocity_cosine: NonNegative = 0.0
    weighting: Weighting = "none"
    snr_gamma: Positive = 5.0

    @override
    def for_latents(self, elements: int) -> Self:
        if self.shift != "auto":
            return self
        return replace(self, shift=math.sqrt(elements / _UNSHIFTED_ELEMENTS))


PROCESSES: Table[type[ProcessSettings]] = Table(
    "diffusion.name", {kind.name: kind for kind in (NoiseDiffusion, FlowMatching)}
)
"""The processes by ``diffusion.name``."""


PUBLISHED_PROCESS = {"name": NoiseDiffusion.name}
"""The process of published weights of DC-DiT and DiT, whose files do not say it."""
