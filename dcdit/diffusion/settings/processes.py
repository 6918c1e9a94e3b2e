"""The settings of diffusion processes, and the table of them."""

from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dcdit.checks import Number, OneOf, Positive, checked

if TYPE_CHECKING:
    from dcdit.diffusion.process import Process


TRAIN_STEPS = 1000
"""Steps of the trained process."""


WEIGHTINGS: dict[str, str | None] = {"none": None, "min_snr": "dcdit.diffusion.loss:min_snr_weight"}
"""What ``diffusion.weighting`` may say: module and function of the weight of a sample's squared error.

The function takes the signal-to-noise ratio (B,), the squared error of x_0 that an error of 1 in the network's
prediction stands for (B,), and ``snr_gamma``; it returns (B,). ``none``, as published, weighs all times alike."""

Weighting = Annotated[str, OneOf(WEIGHTINGS)]


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
        weighting: of the squared error over times, see :data:`WEIGHTINGS`.
        snr_gamma: argument of the weighting.
    """

    implementation: ClassVar[str]
    noisy_sampler: ClassVar[str]
    deterministic_sampler: ClassVar[str]
    weighting: Weighting
    snr_gamma: float

    def build(self) -> "Process":
        """The process with these settings."""
        process: Process = resolve_name(self.implementation)(self)
        return process


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
