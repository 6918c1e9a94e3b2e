"""Classifier-free guidance as a wrapper around a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dcdit.checks import check_drop_fraction
from dcdit.errors import UserError


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
        scale: guidance scale; 1 runs the conditional half alone.
        drop_fraction: tail drop of the conditional half.
        uncond_drop_fraction: tail drop of the unconditional half; None takes the same.
        channels: guided noise channels, None for all.
    """

    denoiser: Denoiser
    null_class: int
    scale: float = 1.0
    drop_fraction: float = 0.0
    uncond_drop_fraction: float | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"scale={self.scale} is negative: 1 is no guidance, 4 is strong")
        check_drop_fraction(self.drop_fraction)
        if self.uncond_drop_fraction is not None:
            check_drop_fraction(self.uncond_drop_fraction, "uncond_drop_fraction")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"channels={self.channels} guides nothing: take 3 as published, or null for all")

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> GuidedOutput:
        """Guided prediction for ``x`` (B, C, H, W), ``t`` (B,), ``y`` (B,); both halves run in one batch of 2B."""
        if self.scale == 1:
            output = self.denoiser(x, t, y, self.drop_fraction)
            return GuidedOutput(output.prediction, output.routing)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        output = self.denoiser(x.repeat(2, 1, 1, 1), t.repeat(2), labels, self._drop(len(x), x.device))
        conditional, unconditional = output.prediction.chunk(2)
        return GuidedOutput(guide(conditional, unconditional, self.scale, self.channels), output.routing)

    def _drop(self, batch: int, device: torch.device) -> float | Tensor:
        if self.uncond_drop_fraction is None or self.uncond_drop_fraction == self.drop_fraction:
            return self.drop_fraction
        halves = torch.tensor([self.drop_fraction, self.uncond_drop_fraction], device=device)
        return halves.repeat_interleave(batch, output_size=2 * batch)
