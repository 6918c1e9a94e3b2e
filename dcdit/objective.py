"""What the router is asked for: the ratio loss and the schedules of its target and of the drop fraction."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
