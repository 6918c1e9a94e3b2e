"""Feature caching: samples that change little from one sampling step to the next reuse what the backbone gave before.

After TeaCache (arXiv 2411.19108), for a network that keeps other tokens at every step: what is kept is the backbone's
output spread over the grid, (B, L, D). Encoder, decoder and router run at every step. Each sample decides for itself,
from the modulated input of the first block, so that it does not depend on its batch. Those that reuse keep no token:
they are left out of the packed sequence, and the one read of its lengths says which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def reuse(added_up: Tensor, change: Tensor, threshold: float, last: bool) -> tuple[Tensor, Tensor]:
    """Whether samples reuse at a step, and their changes added up after it.

    Args:
        added_up: changes since the backbone last ran, (B,) or one number.
        change: that of this step, (B,); infinite at the first. Where it is no number the sample is computed.
        threshold: reuse stays below it.
        last: whether this is the last step, at which all are computed.

    Returns:
        (B,) bool, and (B,).
    """
    added_up = added_up + change
    reused = added_up < (0.0 if last else threshold)
    return reused, added_up.masked_fill(~reused, 0.0)


class FeatureCache:
    """What the samples of one branch of guidance keep from step to step.

    Args:
        threshold: a sample reuses while the relative changes of its input, added up since its backbone last ran, stay
            below this. The change is the mean absolute difference over the mean absolute value of the step before.

    Attributes:
        spread: (B, L, D) what the backbone gave last; empty before the first step.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.spread = torch.empty(0)
        self._before: Tensor | None = None
        self._added_up = torch.zeros(())

    def reuse(self, modulated: Tensor, last: bool, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decide which samples reuse at this step, and keep its input for the next one.

        Args:
            modulated: (B, L, D), the modulated input of this step.
            last: whether this is the last step.
            without: (B,) bool, samples that leave the backbone out, which then gives 0, and do not reuse; the next step
                that does not leave it out computes it. None for no sample.

        Returns:
            Which samples reuse, (B,) bool, none at the first step and at the last; and the relative change of the input
            since the step before, (B,), infinite at the first.
        """
        if self._before is None:
            self.spread = torch.zeros_like(modulated)
            change = modulated.new_full((len(modulated),), float("inf"))
        else:
            difference = (modulated - self._before).abs().mean(dim=(1, 2))
            change = difference / self._before.abs().mean(dim=(1, 2))
        self._before = modulated
        reused, self._added_up = reuse(self._added_up, change, self.threshold, last)
        if without is not None:
            reused, self._added_up = reused & ~without, self._added_up.masked_fill(without, float("inf"))
            self.spread = self.spread.masked_fill(without[:, None, None], 0.0)
        return reused, change


@dataclass(eq=False)
class CachedStep:
    """One step of a batch whose equal parts, the branches of guidance, have a cache each, which the step updates.

    Attributes:
        branches: the caches, in the order of the batch.
        last: whether this is the last step.
    """

    branches: tuple[FeatureCache, ...]
    last: bool

    def reuse(self, modulated: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which samples reuse, (B,) bool, and the relative change of their modulated input (B, L, D), (B,).

        ``without`` (B,) bool are those that leave the backbone out, see :meth:`FeatureCache.reuse`.
        """
        count = len(self.branches)
        parts = modulated.float().chunk(count)
        left_out: Sequence[Tensor | None] = [None] * count if without is None else without.chunk(count)
        decided = [
            branch.reuse(part, self.last, apart)
            for branch, part, apart in zip(self.branches, parts, left_out, strict=True)
        ]
        return torch.cat([reused for reused, _ in decided]), torch.cat([change for _, change in decided])

    def before(self) -> Tensor:
        """What the backbone gave last, (B, L, D): 0 for samples that leave it out."""
        return torch.cat([branch.spread for branch in self.branches])

    def keep(self, spread: Tensor) -> None:
        """Keep what the backbone gave, now or before, (B, L, D)."""
        for branch, part in zip(self.branches, spread.chunk(len(self.branches)), strict=True):
            branch.spread = part


class TrajectoryCache:
    """What the samples of one trajectory keep, in both branches of guidance.

    Args:
        threshold: see :class:`FeatureCache`.
        last: the timestep of the last step.
    """

    def __init__(self, threshold: float, last: float) -> None:
        self.branches, self.last = (FeatureCache(threshold), FeatureCache(threshold)), last

    def step(self, timestep: float, branches: tuple[int, ...]) -> CachedStep:
        """The cache of a batch of these ``branches`` at ``timestep``: 0 is the main one, 1 the guiding one."""
        return CachedStep(tuple(self.branches[branch] for branch in branches), timestep == self.last)
