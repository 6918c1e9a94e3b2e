"""The settings of guidance and of the budget of an image."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from dcdit.checks import Bounds, DropFraction, NotEmpty, Number, Positive, checked, conform
from dcdit.diffusion.settings.processes import TRAIN_STEPS
from dcdit.errors import UserError

Weak = Literal["uncond", "budget", "path", "path_class"]
"""What makes the guiding branch weaker: ``uncond``, it knows no class; ``budget``, it knows the class and drops more
tokens; ``path``, it knows no class and leaves the backbone out (path-drop guidance, arXiv 2510.21986); ``path_class``,
it leaves the backbone out and knows the class."""

PATH_DROP = ("path", "path_class")
"""Where the guiding branch leaves the backbone out."""

GuidanceScale = Annotated[float, Bounds(0, 100, hint="1 is no guidance, 4 is strong")]

Every = Annotated[int, Bounds(1, TRAIN_STEPS, hint="1 runs the guiding branch at every evaluation, 2 at every other")]

DropSchedule = Annotated[list[list[Number]], NotEmpty("give a point, or null for a constant drop_fraction")]


Timestep = Annotated[
    int, Bounds(0, TRAIN_STEPS, hint="timesteps run from 999, of flow matching 1000, which is pure noise, to 0")
]


@checked
@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance of a main branch by a weaker, guiding one: without class (classifier-free), at a smaller budget, or of
    another checkpoint.

    Attributes:
        scale: guidance scale; 1 runs the main branch alone.
        channels: guided noise channels, at most all; None takes 3 of 4, as all published figures, and else all.
        drop_fraction: tail drop of the main branch.
        uncond_drop_fraction: tail drop of the guiding branch (Lite-CFG); None takes the same, or 1 where ``weak`` says
            that it leaves the backbone out.
        weak: see :data:`Weak`. None takes ``uncond``, and with ``weak_checkpoint`` the same class.
        weak_checkpoint: the checkpoint of the guiding branch, see ``resolve_checkpoint``; None for the
            network itself.
        interval: lowest and highest timestep that is guided (arXiv 2404.07724); elsewhere the main branch runs
            alone. None guides all.
        every: k: of the guided evaluations of the network, the guiding branch runs at the first and then at each k-th;
            in between its last prediction is reused.
        drop_schedule: pairs of timestep and drop fraction, linear in between, constant beyond; in place of
            ``drop_fraction``.

    Raises:
        UserError: if a value is out of its range.
    """

    scale: GuidanceScale = 1.0
    channels: Annotated[int, Bounds(1, 10**7, hint="take 3 as published, or as many as there are")] | None = None
    drop_fraction: DropFraction = 0.0
    uncond_drop_fraction: DropFraction | None = None
    weak: Weak | None = None
    weak_checkpoint: str | None = None
    interval: list[Timestep] | None = None
    every: Every = 1
    drop_schedule: DropSchedule | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and (len(self.interval) != 2 or self.interval[0] > self.interval[1]):
            raise UserError(f"interval={self.interval} is no pair of lowest and highest timestep, such as [100, 700]")
        for point in self.drop_schedule or []:
            if len(point) != 2:
                raise UserError(f"drop_schedule={self.drop_schedule}: {point} is no pair of timestep and drop fraction")
            conform("drop_schedule", point[0], Timestep)
            conform("drop_schedule", point[1], DropFraction)
        if self.leaves_path_out and self.uncond_drop_fraction not in (None, 1):
            raise UserError(
                f"uncond_drop_fraction={self.uncond_drop_fraction:g}: with weak={self.weak} the guiding branch leaves"
                " the backbone out and keeps no token; leave one of the two out"
            )
        if self.scale != 1 and self.weak == "path_class" and self.guiding_equals_main:
            raise UserError(
                f"weak={self.weak}: the main branch leaves the backbone out too, so that guidance would lead nowhere:"
                " take a drop_fraction below 1, or weak=path"
            )
        if self.scale != 1 and self.weak == "budget" and self.guiding_equals_main:
            raise UserError(
                f"weak=budget: the guiding branch would drop {self.uncond_drop_fraction or 0:g} of the tokens, no"
                " more than the main branch, and guide nowhere: give guidance.uncond_drop_fraction, such as 0.9"
            )

    @property
    def canonical(self) -> "GuidanceSettings":
        """Equivalent settings in one form: no guiding branch where none runs, and its drop fraction where one does."""
        if self.scale == 1:
            return replace(self, uncond_drop_fraction=None, weak=None, weak_checkpoint=None, every=1)
        if self.leaves_path_out:
            return replace(self, weak="budget" if self.guiding_keeps_class else "uncond", uncond_drop_fraction=1.0)
        if self.uncond_drop_fraction is None and self.drop_schedule is None:
            return replace(self, uncond_drop_fraction=self.drop_fraction)
        return self

    @property
    def guiding_keeps_class(self) -> bool:
        """Whether the guiding branch knows the class."""
        return self.weak in ("budget", "path_class") or (self.weak is None and self.weak_checkpoint is not None)

    @property
    def leaves_path_out(self) -> bool:
        """Whether ``weak`` says that the guiding branch leaves the backbone out."""
        return self.weak in PATH_DROP

    @property
    def guiding_drop_fraction(self) -> float | None:
        """Tail drop of the guiding branch; None for that of the main one."""
        return 1.0 if self.leaves_path_out else self.uncond_drop_fraction

    @property
    def guiding_equals_main(self) -> bool:
        """Whether nothing makes the guiding branch weaker than the main one."""
        least, own = min(self.main_drop_fractions), self.guiding_drop_fraction
        same_budget = own is None or own <= least
        return self.guiding_keeps_class and self.weak_checkpoint is None and same_budget

    def guided_channels(self, channels: int) -> int:
        """How many of the ``channels`` of the latents are guided."""
        return min(self.channels or (3 if channels == 4 else channels), channels)

    def is_guided(self, timestep: float) -> bool:
        """Whether the guiding branch runs too at ``timestep``."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return self.scale != 1 and inside

    def drop_at(self, timestep: float) -> tuple[float, float]:
        """Tail drop of the main and of the guiding branch at ``timestep``."""
        drop = self.drop_fraction
        if self.drop_schedule is not None:
            import numpy as np

            points = sorted(self.drop_schedule)
            drop = float(np.interp(timestep, [point[0] for point in points], [point[1] for point in points]))
        return drop, drop if self.guiding_drop_fraction is None else self.guiding_drop_fraction

    @property
    def main_drop_fractions(self) -> list[float]:
        """Drop fractions of the main branch, between which all others lie."""
        return [self.drop_fraction] if self.drop_schedule is None else [point[1] for point in self.drop_schedule]


@checked
@dataclass(frozen=True)
class BudgetSettings:
    """A budget as a person thinks of it; at most one of the two.

    Attributes:
        tflops: TFLOPs per image, all steps and branches, residual projection included.
        fraction: share of what an image costs without any drop or reuse.
        by: what meets it: the drop fraction, the threshold of feature caching, or both; None takes both where the
            network caches and no threshold is given, after a guiding branch without backbone where the network was
            trained for that and nothing else weakens the branch.
    """

    tflops: Positive | None = None
    fraction: Annotated[float, Bounds(0, 1, open_low=True, hint="0.6 asks for 60% of the full cost")] | None = None
    by: Literal["drop", "cache", "both"] | None = None

    def __post_init__(self) -> None:
        if self.tflops is not None and self.fraction is not None:
            raise UserError(f"tflops={self.tflops} and fraction={self.fraction} are two budgets: give one of them")

    @property
    def given(self) -> bool:
        """Whether there is a budget to meet."""
        return self.tflops is not None or self.fraction is not None
