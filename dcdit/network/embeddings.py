"""Timestep, label and position embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.network.init import normal_init


def frequencies(dim: int, *, dtype: torch.dtype, max_period: float = 10_000.0) -> Tensor:
    """The ``dim // 2`` frequencies ``max_period ** (-i / (dim // 2))`` of a sinusoidal embedding, on the CPU.

    Args:
        dim: number of features, sines and cosines together; even.
        dtype: precision of the exponents and of the result.
    """
    half = dim // 2
    # Rounding the exponent in float32 is part of what is published (at t = 999 it moves an angle by 6e-5); the
    # exponential itself is taken in float64, because CPUs differ in the last bit of the float32 one.
    exponent = -math.log(max_period) * torch.arange(half, dtype=dtype, device="cpu") / half
    return exponent.double().exp().to(dtype)


def position_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sin-cos position table in the layout of MAE.

    The first half of the channels encodes the column, the second half the row; each half holds sines, then cosines.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: channels, divisible by 4.

    Returns:
        (height * width, dim) float32, raster order.
    """
    # Tables are built in float64 on the CPU so that every device and precision sees the same bits.
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device="cpu"),
        torch.arange(width, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    frequency = frequencies(dim // 2, dtype=torch.float64)
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the raw timestep (0..999), then Linear, SiLU, Linear (DiT, section 3.2).

    Args:
        width: output width D.
        features: number of sinusoidal features, cosines first.
    """

    frequency: Tensor

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequency", frequencies(features, dtype=torch.float32), persistent=False)
        self.fc1 = normal_init(nn.Linear(features, width))
        self.fc2 = normal_init(nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed ``timestep`` (B,) as (B, D)."""
        angle = timestep.float()[:, None] * self.frequency
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=1))))


class LabelEmbedding(nn.Module):
    """Class table with one more row, the null class, which replaces labels at random in training.

    Args:
        num_classes: number of real classes; row ``num_classes`` is the null class.
        width: output width D.
        dropout: probability of the null class in training (classifier-free guidance needs it above 0).
    """

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.table = normal_init(nn.Embedding(num_classes + 1, width))

    def forward(self, label: Tensor) -> Tensor:
        """Embed ``label`` (B,), integers in 0..num_classes, as (B, D)."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(label.shape, device=label.device) < self.dropout
            label = label.masked_fill(dropped, self.num_classes)
        return self.table(label)


class Conditioning(nn.Module):
    """c = time(t) + label(y), a vector of width D per sample."""

    def __init__(self, width: int, num_classes: int, label_dropout: float) -> None:
        super().__init__()
        self.time = TimestepEmbedding(width)
        self.label = LabelEmbedding(num_classes, width, label_dropout)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) timesteps and (B,) labels to (B, D)."""
        return self.time(t) + self.label(y)
