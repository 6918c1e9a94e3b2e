"""Tokens that the capacity of sampling had no room for, for results and for people. No torch here."""

import math
from dataclasses import dataclass

from dcdit.checks import Count, NonNegative

MARGIN = 1.25
"""Room over what few images keep, for what batches and classes differ in. On digits the most that one image kept at a
step was 1.21 times the mean of 32 others, the most that a batch of eight kept 1.04 times. With ``sampler.cache=0.3`` a
batch of 64 kept up to 1.06 times as much, one of 16 up to 1.38 times."""


@dataclass(frozen=True)
class Dropped:
    """Tokens that a capacity had no room for, as shares of those that router and tail drop kept.

    Attributes:
        share: of all steps.
        step: the evaluation of the network, from 1, at which the share was greatest.
        steps: number of evaluations.
        most: that share.
        needed: greatest share of the positions that a step would have kept, in the mean of its branches.
    """

    share: NonNegative
    step: Count
    steps: Count
    most: NonNegative
    needed: NonNegative

    def described(self, capacity: float | str | None) -> str:
        """Return what to tell the user of images at this ``capacity``."""
        least = capacity if isinstance(capacity, float) else MARGIN * self.needed  # what did not suffice
        enough = min(1.0, math.ceil(100 * MARGIN * max(least, self.needed)) / 100)
        asked = "auto" if isinstance(capacity, str) else capacity
        return (
            f"capacity={asked}: {self.share:.2%} of the kept tokens had no room and were dropped, most at step"
            f" {self.step} of {self.steps} ({self.most:.1%}); give more room, such as capacity={enough:g}, or"
            " capacity=null"
        )
