"""Classifier-free guidance as a wrapper around a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dcdit.diffusion.settings import GuidanceSettings


class RoutingLike(Protocol):
    """A router's decision: probabilities, and what was kept before and after the tail drop, each (B, L)."""

    @property
    def prob(self) -> Tensor: ...  # noqa: D102
    @property
    def natural_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def mask(self) -> Tensor: ...  # noqa: D102


class Prediction(Protocol):
    """What a denoiser returns: noise and variance (B, 2C, H, W), and the routing if there is any."""

    @property
    def prediction(self) -> Tensor: ...  # noqa: D102
    @property
    def routing(self) -> RoutingLike | None: ...  # noqa: D102


Denoiser = Callable[[Tensor, Tensor, Tensor, "float | Tensor"], Prediction]
"""``denoiser(x, t, y, drop_fraction)``: a network."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int | None) -> Tensor:
    """eps = eps_u + s (eps_c - eps_u) on the leading channels of the conditional prediction.

    Args:
        conditional, unconditional: (B, 2C, H, W).
        scale: guidance scale s; 1 is the conditional prediction.
        channels: how many noise channels to guide, at most C; None guides all C. The published numbers guided 3 of 4.

    Returns:
        (B, 2C, H, W): the remaining noise channels and the variance are the conditional ones.
    """
    noise_channels = conditional.shape[1] // 2
    guided = noise_channels if channels is None else min(channels, noise_channels)
    noise = unconditional[:, :guided] + scale * (conditional[:, :guided] - unconditional[:, :guided])
    return torch.cat([noise, conditional[:, guided:]], dim=1)


@dataclass(frozen=True)
class GuidedOutput:
    """Guided prediction (B, 2C, H, W), and the routing of the conditional and, if it ran, the unconditional half."""

    prediction: Tensor
    routing: RoutingLike | None


@dataclass(frozen=True)
class Guidance:
    """A denoiser under classifier-free guidance, with its own budget for each half (Lite-CFG).

    Attributes:
        denoiser: the network.
        null_class: label of the unconditional half.
        settings: how strong, where, and at which budgets.
    """

    denoiser: Denoiser
    null_class: int
    settings: GuidanceSettings

    def __call__(self, x: Tensor, timestep: int, y: Tensor) -> GuidedOutput:
        """Guided prediction for ``x`` (B, C, H, W), ``y`` (B,) at ``timestep``; both halves run in one batch of 2B."""
        drop, uncond_drop = self.settings.drop_at(timestep)
        if not self.settings.is_guided(timestep):
            output = self.denoiser(x, torch.full_like(y, timestep), y, drop)
            return GuidedOutput(output.prediction, output.routing)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        fractions: float | Tensor = drop
        if uncond_drop != drop:
            halves = torch.tensor([drop, uncond_drop], device=x.device)
            fractions = halves.repeat_interleave(len(y), output_size=2 * len(y))
        output = self.denoiser(x.repeat(2, 1, 1, 1), torch.full_like(labels, timestep), labels, fractions)
        conditional, unconditional = output.prediction.chunk(2)
        return GuidedOutput(
            guide(conditional, unconditional, self.settings.scale, self.settings.channels), output.routing
        )
