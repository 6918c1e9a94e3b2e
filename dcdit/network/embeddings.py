"""Timestep, label and position embeddings."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.errors import UserError
from dcdit.network.initialisers import normal_init

FreqShift = Literal[0, 1]
"""0: frequencies of timesteps fall as 10000^(-i / 128), as published. 1: as 10000^(-i / 127), diffusers' DiT."""

TimeInput = Literal["steps", "unit", "reversed"]
"""What of a timestep is embedded: ``steps`` itself, 0 (image) to 1000 (noise), as published for DiT and DC-DiT;
``unit`` t = timestep / 1000, as REPA's code trains; ``reversed`` 1 - t, as SiT's code trains."""

PURE_NOISE = 1000
"""The timestep of pure noise."""


def frequencies(dim: int, *, dtype: torch.dtype, max_period: float = 10_000.0, shift: int = 0) -> Tensor:
    """The ``dim // 2`` frequencies ``max_period ** (-i / (dim // 2 - shift))`` of a sinusoidal embedding, on the CPU.

    Args:
        dim: number of features, sines and cosines together; even.
        dtype: precision of the exponents and of the result.
        max_period: of the slowest, if ``shift`` is 1.
        shift: see :data:`FreqShift`.
    """
    half = dim // 2
    # Rounding the exponent in float32 is part of what is published (at t = 999 it moves an angle by 6e-5); the
    # exponential itself is taken in float64, because CPUs differ in the last bit of the float32 one.
    exponent = -math.log(max_period) * torch.arange(half, dtype=dtype, device="cpu") / (half - shift)
    return exponent.double().exp().to(dtype)


def axis_angles(size: int, dim: int, patch: int = 1) -> Tensor:
    """The angles of the coordinates of one axis, ``dim // 2`` frequencies each: (size, dim // 2) float64, on the CPU.

    Args:
        size: coordinates of the axis.
        dim: features that sines and cosines make of them; even.
        patch: count in patches of this side: position u has the coordinate (u + 1/2) / patch - 1/2.
    """
    coordinates = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / patch - 0.5
    return coordinates[:, None] * frequencies(dim, dtype=torch.float64)


def position_table(height: int, width: int, dim: int, patch: int = 1) -> Tensor:
    """Fixed 2-D sin-cos position table in the layout of MAE.

    The first half of the channels encodes the column, the second half the row; each half holds sines, then cosines.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: channels, divisible by 4.
        patch: see :func:`axis_angles`.

    Returns:
        (height * width, dim) float32, raster order.

    Raises:
        UserError: if ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise UserError(f"width={dim} is not divisible by 4, which the 2-D position table needs")
    # Tables are built in float64 on the CPU so that every device and precision sees the same bits; each axis by itself,
    # so that nothing larger than the table is held.

    def features(size: int) -> Tensor:
        angles = axis_angles(size, dim // 2, patch)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    if torch.get_default_device().type == "meta":  # whoever builds at no cost does not look at it
        return torch.empty(height * width, dim)
    table = torch.empty(height, width, dim, device="cpu")
    table[..., : dim // 2] = features(width)
    table[..., dim // 2 :] = features(height)[:, None]
    return table.flatten(0, 1).to(torch.get_default_device())


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the timestep, then Linear, SiLU, Linear (DiT, section 3.2).

    Args:
        width: output width D.
        freq_shift: see :data:`FreqShift`.
        time_input: see :data:`TimeInput`.
        features: number of sinusoidal features, cosines first.
    """

    frequency: Tensor

    def __init__(
        self, width: int, freq_shift: FreqShift = 0, time_input: TimeInput = "steps", features: int = 256
    ) -> None:
        super().__init__()
        self.time_input = time_input
        table = frequencies(features, dtype=torch.float32, shift=freq_shift)
        self.register_buffer("frequency", table.to(torch.get_default_device()), persistent=False)
        self.fc1 = normal_init(nn.Linear(features, width))
        self.fc2 = normal_init(nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed ``timestep`` (B,), from 0, the image, to 1000, pure noise, as (B, D)."""
        time = timestep.float()
        if self.time_input != "steps":
            time = time / PURE_NOISE
        if self.time_input == "reversed":
            time = 1 - time
        angle = time[:, None] * self.frequency
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=1))))


class LabelEmbedding(nn.Module):
    """Class table with one more row, the null class.

    Args:
        num_classes: number of real classes; row ``num_classes`` is the null class.
        width: output width D.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = normal_init(nn.Embedding(num_classes + 1, width))

    def forward(self, label: Tensor) -> Tensor:
        """Embed ``label`` (B,), integers in 0..num_classes, as (B, D)."""
        return self.table(label)


class Conditioning(nn.Module):
    """c = time(t) + label(y), a vector of width D per sample."""

    def __init__(
        self, width: int, num_classes: int, freq_shift: FreqShift = 0, time_input: TimeInput = "steps"
    ) -> None:
        super().__init__()
        self.time = TimestepEmbedding(width, freq_shift, time_input)
        self.label = LabelEmbedding(num_classes, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) timesteps and (B,) labels to (B, D)."""
        return self.time(t) + self.label(y)
