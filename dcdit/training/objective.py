"""The objective of the router: the ratio loss, and the schedules of its target and of the drop fraction."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def ratio_loss(prob: Tensor, natural_mask: Tensor, compression: float | Tensor, group: int | None = 16) -> Tensor:
    """Pull the keep ratio towards 1 / N (paper, ratio loss).

    With r the keep ratio and p the mean probability of a group of samples:
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


def balanced_timesteps(
    draw: Callable[[int, torch.Generator], Tensor], seed: int, world_size: int, rank: int, batch: int
) -> Tensor:
    """Timesteps of one rank such that all ranks have about the same number of tokens to compute.

    How many tokens the router keeps depends on the timestep more than on the image. So the timesteps of the whole batch
    are sampled independently, as ever, but sorted and dealt to the ranks there and back, like cards. Samples come to
    the ranks at random, so the pairs of samples and timesteps are distributed as if each rank had sampled its own.

    Args:
        draw: so many timesteps, independently, on the CPU.
        seed: the same on every rank, another at every step.
        world_size, rank: of the ranks.
        batch: samples of each rank.

    Returns:
        (batch,) as ``draw`` has them, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    hands = draw(world_size * batch, generator).sort().values.view(batch, world_size)
    hands[1::2] = hands[1::2].flip(1)
    hand = torch.randperm(world_size, generator=generator)[rank]  # else the first rank always had the lowest card
    return hands[torch.randperm(batch, generator=generator), hand]


def target_compression(step: int, compression: float, start: float | None, steps: int) -> float:
    """Target N at ``step``: linear from ``start`` over ``steps``, then constant; None starts at the target."""
    if start is None or step >= steps:
        return compression
    return start + (compression - start) * step / steps


def drop_path(drop_fraction: float, probability: float, batch: int, device: torch.device) -> Tensor:
    """Drop fractions of samples, (B,): each leaves the backbone out, at 1, with this probability (arXiv 2510.21986).

    Args:
        drop_fraction: of the others.
        probability, batch, device: of path drop; B; of the result.
    """
    dropped = torch.rand(batch, device=device) < probability
    return torch.full((batch,), drop_fraction, device=device).masked_fill(dropped, 1.0)


def drop_fraction_at(step: int, seed: int, fractions: Sequence[float], full_budget_steps: int) -> float:
    """Drop fraction of optimiser step ``step``: 0 at first, then one of ``fractions``, each equally likely.

    A pure function, so every rank samples the same and a resumed run what the uninterrupted one would.
    """
    if step < full_budget_steps or not fractions:
        return 0.0
    draw = np.random.default_rng([seed, step]).integers(len(fractions))
    return float(fractions[int(draw)])
