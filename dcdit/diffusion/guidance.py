"""Classifier-free guidance as a wrapper around a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
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
        interval: lowest and highest timestep that is guided (arXiv 2404.07724); elsewhere the conditional half runs
            alone. None guides all.
        drop_schedule: pairs of timestep and drop fraction, linear in between, constant beyond; in place of
            ``drop_fraction``.

    Raises:
        UserError: if a value is out of its range.
    """

    denoiser: Denoiser
    null_class: int
    scale: float = 1.0
    drop_fraction: float = 0.0
    uncond_drop_fraction: float | None = None
    channels: int | None = None
    interval: list[int] | None = None
    drop_schedule: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"scale={self.scale} is negative: 1 is no guidance, 4 is strong")
        check_drop_fraction(self.drop_fraction)
        if self.uncond_drop_fraction is not None:
            check_drop_fraction(self.uncond_drop_fraction, "uncond_drop_fraction")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"channels={self.channels} guides nothing: take 3 as published, or null for all")
        if self.interval is not None and (len(self.interval) != 2 or self.interval[0] > self.interval[1]):
            raise UserError(f"interval={self.interval} is no pair of lowest and highest timestep, such as [100, 700]")
        for point in self.drop_schedule or []:
            if len(point) != 2:
                raise UserError(f"drop_schedule={self.drop_schedule}: {point} is no pair of timestep and drop fraction")
            check_drop_fraction(point[1], "drop_schedule")
        if self.drop_schedule == []:
            raise UserError("drop_schedule=[] has no points: give at least one, or null for a constant drop_fraction")

    def is_guided(self, timestep: int) -> bool:
        """Whether both halves run at ``timestep``."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return self.scale != 1 and inside

    def drop_at(self, timestep: int) -> tuple[float, float]:
        """Tail drop of the conditional and of the unconditional half at ``timestep``."""
        drop = self.drop_fraction
        if self.drop_schedule is not None:
            points = sorted(self.drop_schedule)
            drop = float(np.interp(timestep, [point[0] for point in points], [point[1] for point in points]))
        return drop, drop if self.uncond_drop_fraction is None else self.uncond_drop_fraction

    def __call__(self, x: Tensor, timestep: int, y: Tensor) -> GuidedOutput:
        """Guided prediction for ``x`` (B, C, H, W), ``y`` (B,) at ``timestep``; both halves run in one batch of 2B."""
        drop, uncond_drop = self.drop_at(timestep)
        if not self.is_guided(timestep):
            output = self.denoiser(x, torch.full_like(y, timestep), y, drop)
            return GuidedOutput(output.prediction, output.routing)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        fractions: float | Tensor = drop
        if uncond_drop != drop:
            halves = torch.tensor([drop, uncond_drop], device=x.device)
            fractions = halves.repeat_interleave(len(y), output_size=2 * len(y))
        output = self.denoiser(x.repeat(2, 1, 1, 1), torch.full_like(labels, timestep), labels, fractions)
        conditional, unconditional = output.prediction.chunk(2)
        return GuidedOutput(guide(conditional, unconditional, self.scale, self.channels), output.routing)
