"""What the router is asked for: the ratio loss and the schedules of its target and of the drop fraction."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcdit.checks import check_compression, check_drop_fraction
from dcdit.errors import UserError


@dataclass(frozen=True)
class Ratio:
    """The ratio loss.

    Attributes:
        weight: weight of the ratio loss beside the diffusion loss.
        group: samples whose kept share is averaged before the loss; None takes the whole local batch.
        start: compression that the curriculum starts from; None starts at the target.
        warmup: optimiser steps of the curriculum.
    """

    weight: float = 0.03
    group: int | None = 16
    start: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise UserError(f"group={self.group} is not a positive number: take 16, or null for the whole batch")
        if self.start is not None:
            check_compression(self.start, "start")


@dataclass(frozen=True)
class Budget:
    """Multi-budget training: the drop fractions that steps draw from.

    Attributes:
        fractions: set of drop fractions; empty trains at the full budget only.
        warmup: optimiser steps at the full budget before the first draw.
    """

    fractions: list[float]
    warmup: int = 50_000

    def __post_init__(self) -> None:
        for fraction in self.fractions:
            check_drop_fraction(fraction, "fractions")


def ratio_loss(prob: Tensor, natural_mask: Tensor, compression: float | Tensor, group: int | None = 16) -> Tensor:
    """Pull the kept share towards 1 / N (paper, ratio loss).

    With r the kept share and p the mean probability of a group of samples:
    N / (N - 1) * ((N - 1) r p + (1 - r)(1 - p)); only p carries a gradient. It is 1 where r = p = 1 / N.

    Args:
        prob: (B, L) boundary probabilities, the two forced ones included.
        natural_mask: (B, L) bool, what the router keeps by itself.
        compression: N > 1.
        group: samples per group; None takes the whole batch. Groups weigh by their size, the last may be smaller.

    Returns:
        Scalar, float32.
    """
    size = group or len(prob)
    shares = natural_mask.float().mean(dim=1).split(size)
    probs = prob.float().mean(dim=1).split(size)
    total = prob.new_zeros((), dtype=torch.float32)
    for kept, probability in zip(shares, probs, strict=True):
        r, p = kept.mean(), probability.mean()
        total = total + len(kept) * ((compression - 1) * r * p + (1 - r) * (1 - p))
    return compression / (compression - 1) * total / len(prob)


def dealt_timesteps(seed: int, steps: int, world_size: int, rank: int, batch: int) -> Tensor:
    """Timesteps of one rank such that all ranks have about the same number of tokens to compute.

    How many tokens the router keeps depends on the timestep more than on the image. So the timesteps of the whole batch
    are drawn independently, as ever, but sorted and dealt to the ranks there and back, like cards. Samples come to the
    ranks at random, so the pairs of samples and timesteps are distributed as if each rank had drawn its own.

    Args:
        seed: the same on every rank, another at every step.
        steps: timesteps are drawn from 0 to ``steps`` - 1.
        world_size, rank: of the ranks.
        batch: samples of each rank.

    Returns:
        (batch,) int64, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    hands = torch.randint(steps, (world_size * batch,), generator=generator).sort().values.view(batch, world_size)
    hands[1::2] = hands[1::2].flip(1)
    place = torch.randperm(world_size, generator=generator)[rank]  # else the first rank always had the lowest card
    return hands[torch.randperm(batch, generator=generator), place]


def target_compression(step: int, compression: float, start: float | None, warmup: int) -> float:
    """Target N at ``step``: linear from ``start`` over ``warmup`` steps, then constant; None starts at the target."""
    if start is None or step >= warmup:
        return compression
    return start + (compression - start) * step / warmup


def drop_fraction_at(step: int, seed: int, fractions: Sequence[float], warmup: int) -> float:
    """Drop fraction of optimiser step ``step``: 0 during the warm-up, then one of ``fractions``, each equally likely.

    A pure function, so every rank draws the same and a resumed run draws what the uninterrupted one would.
    """
    if step < warmup or not fractions:
        return 0.0
    draw = np.random.default_rng([seed, step]).integers(len(fractions))
    return float(fractions[int(draw)])
