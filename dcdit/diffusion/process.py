"""A diffusion process as one object: what noise does to latents, what a network predicts of it, and what that costs.

Nothing outside asks which process it is. Its time is what the network is told: timestep 0 to 999 of DDPM, 1000 t of
flow matching; 0 is the image, the upper end pure noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dcdit.checks import build_named
from dcdit.diffusion.loss import DiffusionLoss, cosine_loss, diffusion_loss
from dcdit.diffusion.schedule import BETA_END, BETA_START, Posterior, add_noise, per_sample, shift_times
from dcdit.diffusion.settings import (
    PROCESSES,
    TRAIN_STEPS,
    WEIGHTINGS,
    FlowMatching,
    NoiseDiffusion,
    ProcessSettings,
)
from dcdit.errors import UserError


class Process(ABC):
    """What everything else asks of a diffusion process.

    Attributes:
        settings: what can be chosen of it.
        needs_variance: whether a network must predict a variance beside.
    """

    settings: ProcessSettings
    needs_variance: bool = False

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Random times of training, (count,)."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents ``x0`` (B, C, H, W) at times ``t`` (B,)."""

    @abstractmethod
    def loss(self, prediction: Tensor, x0: Tensor, xt: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        """Loss per sample of a prediction (B, C or 2C, H, W) for ``xt``, which is made of ``x0`` and ``noise``."""

    @abstractmethod
    def signal_to_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The signal-to-noise ratio at times ``t`` (B,), and the squared error of x_0 per one of noise or velocity.

        Both are (B,); a weighting of the loss needs them, see :data:`dcdit.diffusion.settings.WEIGHTINGS`.
        """

    def weight(self, t: Tensor) -> Tensor | None:
        """The weight of the squared error at times ``t`` (B,): (B,); None where all times weigh the same."""
        weighting = WEIGHTINGS[self.settings.weighting]
        if weighting is None:
            return None
        weight: Tensor = resolve_name(weighting)(*self.signal_to_noise(t), self.settings.snr_gamma)
        return weight

    @abstractmethod
    def clean(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        """x_0 (B, C, H, W) that a prediction for ``x`` at time ``t`` amounts to."""

    def for_sampler(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        """What samplers integrate, noise and variance or velocity, of a prediction for ``x`` at time ``t``.

        Both are (B, C or 2C, H, W). The same for all networks of a process, whatever they predict.
        """
        return prediction

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The process in plain values, for whoever reads an exported network without this package."""

    def to(self, device: torch.device) -> "Process":
        """Move what it has to a device; returns itself."""
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """What :func:`build_process` makes this process of."""
        return self.settings.spec

    def check_variance(self, variance: bool) -> None:
        """Raise :class:`UserError` if a network without predicted variance cannot be trained by this process."""
        if self.needs_variance and not variance:
            raise UserError(
                f"model.variance=false: diffusion={self.settings.name} trains a variance beside the noise; leave it"
                " out, or take diffusion=flow"
            )


class NoiseProcess(Process):
    """The process of DiT and ADM: linear betas, noise prediction, learned range variance (DDPM, Improved DDPM)."""

    needs_variance = True

    def __init__(self, settings: NoiseDiffusion) -> None:
        self.settings: NoiseDiffusion = settings
        self.tables = Posterior.linear()

    @override
    def to(self, device: torch.device) -> Process:
        self.tables = self.tables.to(device)
        return self

    @override
    def draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Uniform over the timesteps, (count,) int64."""
        return torch.randint(TRAIN_STEPS, (count,), generator=generator, device=device)

    @override
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return add_noise(self.tables, x0, noise, t)

    @override
    def loss(self, prediction: Tensor, x0: Tensor, xt: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        loss = diffusion_loss(self.tables, prediction, x0, xt, noise, t)
        return DiffusionLoss(loss.mse, loss.vlb, self.weight(t))

    @override
    def signal_to_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        variance = per_sample(self.tables.sqrt_one_minus_alpha_bar, t).flatten().square()
        snr = (1 - variance) / variance
        return snr, 1 / snr

    @override
    def clean(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        noise = prediction[:, : x.shape[1]]
        return (x - self.tables.sqrt_one_minus_alpha_bar[int(t)] * noise) / self.tables.sqrt_alpha_bar[int(t)]

    @override
    def facts(self) -> dict[str, Any]:
        return {
            "process": "ddpm",
            "train_steps": TRAIN_STEPS,
            "betas": "linear",
            "beta_start": BETA_START,
            "beta_end": BETA_END,
            "prediction": "noise",
            "variance": "learned_range",
        }


LEAST_DIVISOR = 0.05
"""The least t that velocities of predicted images are divided by, v = (x_t - x_0) / max(t, 0.05) (JiT)."""


class FlowProcess(Process):
    """Flow matching on the straight line from image to noise (SiT, arXiv 2401.08740): x_t = (1 - t) x_0 + t noise.

    The network predicts the velocity v = noise - x_0, or x_0, told 1000 t; a variance beside it is not used.

    Raises:
        UserError: if a setting is still ``auto``.
    """

    def __init__(self, settings: FlowMatching) -> None:
        if settings.shift == "auto":
            raise UserError("diffusion.shift=auto depends on the size of latents: take FlowMatching.for_latents")
        self.settings: FlowMatching = settings
        self.shift = settings.shift
        self.predicts_image = settings.prediction == "x"

    @override
    def draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """(count,) float32 in (0, 1000)."""
        if self.settings.time == "uniform":
            times = torch.rand(count, generator=generator, device=device)
        else:
            normal = torch.randn(count, generator=generator, device=device)
            times = (self.settings.time_mean + self.settings.time_std * normal).sigmoid()
        return TRAIN_STEPS * shift_times(times, self.shift)

    @override
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        share = (t / TRAIN_STEPS)[:, None, None, None]
        return (1 - share) * x0 + share * noise

    @override
    def loss(self, prediction: Tensor, x0: Tensor, xt: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        """The mean squared error of the velocity, and its cosine.

        Of a predicted image both velocities are (x_t - x_0) / max(t, 0.05): the best prediction is x_0 at all t.
        """
        velocity = self.velocity(prediction.float()[:, : x0.shape[1]], xt, t)
        target = self.velocity(x0, xt, t) if self.predicts_image else noise - x0
        mse = (target - velocity).square().flatten(1).mean(dim=1)
        cosine_weight = self.settings.velocity_cosine
        cosine = cosine_loss(velocity, target) if cosine_weight else None
        return DiffusionLoss(mse, None, self.weight(t), cosine, cosine_weight)

    def velocity(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity (B, C, H, W) that ``predicted`` of the network amounts to, for ``x`` at ``t`` (B,)."""
        return (x - predicted) / self._divisor(t)[:, None, None, None] if self.predicts_image else predicted

    def _divisor(self, t: Tensor) -> Tensor:
        """What a difference to x_0 is divided by to be a velocity, (B,)."""
        share = t / TRAIN_STEPS
        return share.clamp(min=LEAST_DIVISOR) if self.predicts_image else share

    @override
    def signal_to_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        share = t / TRAIN_STEPS
        return ((1 - share) / share).square(), self._divisor(t).square()

    @override
    def clean(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        predicted = prediction[:, : x.shape[1]]
        return predicted if self.predicts_image else x - t / TRAIN_STEPS * predicted

    @override
    def for_sampler(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        if not self.predicts_image:
            return prediction
        return self.velocity(prediction[:, : x.shape[1]], x, torch.full((len(x),), t, device=x.device))

    @override
    def facts(self) -> dict[str, Any]:
        facts = {"process": "flow", "path": "x_t = (1 - t) x_0 + t noise"}
        if self.predicts_image:
            facts |= {"prediction": "image x_0", "velocity": f"(x_t - x_0) / max(t, {LEAST_DIVISOR})"}
        else:
            facts |= {"prediction": "velocity noise - x_0"}
        shift = {} if self.shift == 1 else {"time_shift": self.shift}
        settings = self.settings
        normal = f"logit-normal, mean {settings.time_mean:g}, deviation {settings.time_std:g}"
        times = "uniform" if settings.time == "uniform" else normal
        return {**facts, "time": f"{TRAIN_STEPS} t", "times_of_training": times, **shift}


def build_process(spec: Mapping[str, Any]) -> Process:
    """The process that ``spec`` describes: ``name``, one of :data:`PROCESSES`, and its settings.

    Raises:
        UserError: if the name is not on the list, or a value is unknown, of the wrong type or out of range.
    """
    return build_named(PROCESSES, spec, "diffusion").build()
