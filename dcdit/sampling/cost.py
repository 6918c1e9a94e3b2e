"""What sampled images cost: FLOPs, and the tokens that were kept, summed up batch by batch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from dcdit.sampling.dropped import Dropped
from dcdit.sampling.generate import SampleBatch

Tokens = list[int | None]
"""Tokens kept at each step, summed over images; None where the branch did not run, or has no router."""


@dataclass(frozen=True)
class SamplingCost:
    """The cost of a number of images; costs of batches, chunks and processes can be added.

    Attributes:
        images: how many images were sampled.
        flops: of all images, steps and branches.
        main: tokens that the main branch kept.
        guiding: tokens that the guiding branch kept.
        computed: evaluations with a router that reused nothing, summed over images, steps and branches.
        beyond: tokens at each step that a capacity had no room for; empty without one.
    """

    images: int = 0
    flops: float = 0.0
    main: Tokens = field(default_factory=list)
    guiding: Tokens = field(default_factory=list)
    computed: int = 0
    beyond: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, batch: SampleBatch) -> "SamplingCost":
        """Return the cost of a batch."""
        sums: tuple[Tokens, Tokens] = ([], [])
        computed = 0
        for step in batch.lengths:
            for branch, tokens in enumerate(sums):
                lengths = step[branch] if branch < len(step) else None
                tokens.append(None if lengths is None else int(lengths.sum()))
                computed += 0 if lengths is None else int((lengths > 0).sum())
        return cls(len(batch.indices), batch.flops.sum().item(), *sums, computed, list(batch.beyond))

    @classmethod
    def total(cls, costs: Iterable["SamplingCost"]) -> "SamplingCost":
        """Return the sum of costs of samples with the same sampler and guidance."""
        return sum(costs, cls())

    def __add__(self, other: "SamplingCost") -> "SamplingCost":
        """Return the cost of both together."""
        return SamplingCost(
            self.images + other.images,
            self.flops + other.flops,
            _add(self.main, other.main),
            _add(self.guiding, other.guiding),
            self.computed + other.computed,
            [int(tokens or 0) for tokens in _add([*self.beyond], [*other.beyond])],
        )

    @property
    def tflops_per_image(self) -> float:
        """TFLOPs of an image, all steps and branches."""
        return self.flops / self.images / 1e12

    @property
    def computed_share(self) -> float:
        """Share of the evaluations with a router that reused nothing; 1 where there are none."""
        evaluations = self.images * sum(tokens is not None for tokens in (*self.main, *self.guiding))
        return self.computed / evaluations if evaluations else 1.0

    def keep_ratios(self, positions: int) -> tuple[list[float | None], list[float | None]]:
        """Return the keep ratios at each step of the main and of the guiding branch; ``positions`` is H * W."""
        main, guiding = (
            [None if kept is None else kept / (self.images * positions) for kept in tokens]
            for tokens in (self.main, self.guiding)
        )
        return main, guiding

    def mean_keep_ratio(self, positions: int) -> float | None:
        """Return the keep ratio in the mean of all steps and branches with a router; None where there are none."""
        ratios = [ratio for branch in self.keep_ratios(positions) for ratio in branch if ratio is not None]
        return torch.tensor(ratios, dtype=torch.float64).mean().item() if ratios else None

    def dropped(self, positions: int) -> Dropped | None:
        """Return what a capacity had no room for; None where all had; ``positions`` is H * W."""
        if not any(self.beyond):
            return None
        steps = [
            [tokens for tokens in branches if tokens is not None]
            for branches in zip(self.main, self.guiding, strict=True)
        ]
        wanted = [sum(branches) + tokens for branches, tokens in zip(steps, self.beyond, strict=True)]
        shares = [tokens / max(1, all_of) for tokens, all_of in zip(self.beyond, wanted, strict=True)]
        ran = [max(1, len(branches)) * self.images * positions for branches in steps]
        needed = max(tokens / places for tokens, places in zip(wanted, ran, strict=True))
        worst = max(range(len(shares)), key=shares.__getitem__)
        return Dropped(sum(self.beyond) / sum(wanted), worst + 1, len(shares), shares[worst], needed)


def _add(tokens: Tokens, others: Tokens) -> Tokens:
    """Return the sums step by step; either may be empty, of no images."""
    if not (tokens and others):
        return tokens or others
    return [None if a is None or b is None else a + b for a, b in zip(tokens, others, strict=True)]
