"""The best guidance scale at each budget: few images first, more near the optimum."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcdit.evaluation.descriptions import describe_budget
from dcdit.evaluation.measure import Deadline, Measurement
from dcdit.evaluation.points import Evaluation
from dcdit.evaluation.settings import figures_of_metrics
from dcdit.runtime.files import write_text
from dcdit.runtime.processes import rank
from dcdit.sampling.setup import Sampling

_SHARES = (10, 3, 1)
"""Images of a round are the count divided by these; each round looks around the best of the one before."""

_MOST = 6
"""Rounds at the most: where the best stands at the end of what all images have seen, its neighbour is measured too."""


class Search:
    """A search for the best guidance scale at each budget.

    The first round measures the given scales with a tenth of the images, the second the best of them and the middles
    towards its neighbours with a third, the last the same around the best of the second with all images, and then
    neighbours until the best stands between two that are worse.

    Args:
        evaluation: what the measurements share.
        rank, world_size: of this process; it waits for what others measure.
        deadline: no chunk is begun after it.

    Attributes:
        last: complete measurements of the last round at each budget.
        log: a line for every round.
    """

    def __init__(self, evaluation: Evaluation, rank: int, world_size: int, deadline: Deadline) -> None:
        self.evaluation, self.rank, self.world_size, self.deadline = evaluation, rank, world_size, deadline
        self.figure = figures_of_metrics(evaluation.metrics)[0]
        self.left = evaluation.settings.max_images
        self.last: list[Measurement] = []
        self.log: list[str] = []

    def run(self, samplings: Sequence[Sampling]) -> bool:
        """Search between the scales of ``samplings``, which have every budget at every scale to begin with.

        Returns:
            Whether all was measured.
        """
        budgets: dict[str, Sampling] = {}
        for sampling in samplings:
            if sampling.guidance.settings.scale != 1:
                config = replace(sampling.config, guidance=replace(sampling.config.guidance, scale=2.0))
                budgets.setdefault(repr(config), sampling)
        scales = sorted({sampling.guidance.settings.scale for sampling in samplings})
        return all(self.at_budget(sampling, scales) for sampling in budgets.values())

    def at_budget(self, sampling: Sampling, scales: Sequence[float]) -> bool:
        """Do all rounds at one budget; return whether they are complete."""
        known, now = sorted(scales), list(scales)
        budget = describe_budget(self.evaluation.of(sampling).plan)
        least, whole = min(self.evaluation.least, self.evaluation.settings.count), self.evaluation.settings.count
        shares = list(_SHARES)
        final: dict[float, Measurement] = {}
        for number, share in enumerate(shares, 1):
            count = max(whole // share, least)
            figures = self._round(f"{budget}: round {number}", sampling, now, count, final if share == 1 else {})
            if figures is None:
                return False
            best = self._best(figures)
            beside = [scale for scale in _neighbours(best, known) if scale not in figures]
            now = sorted({best, *_middles(best, known)} if share != 1 else beside)
            if share == 1 and now and len(shares) < _MOST:  # the best is at the end of what all images have seen
                shares.append(1)
            known = sorted({*known, *now})
        self.last += [final[scale] for scale in sorted(final)]
        if best in (known[0], known[-1]):
            self._note(f"{budget}: guidance {best:g} is the end of the scales that were given: look beyond it too")
        return True

    def _round(
        self, title: str, sampling: Sampling, scales: Sequence[float], count: int, before: dict[float, Measurement]
    ) -> dict[float, float] | None:
        """Measure ``scales`` with ``count`` images each; return the figures of ``before`` and these, by scale.

        The new measurements are added to ``before``. Returns None if time or images do not suffice.
        """
        limit = self.evaluation.settings.max_images
        if self.left is not None and self.left < count * len(scales):
            self._note(f"{title} would exceed max_images={limit}: raise it to go on from here")
            return None
        points = {scale: self.evaluation.of(_at_scale(sampling, scale), count) for scale in scales}
        if len(self._measured(list(points.values()))) < len(points):
            self._note(f"{title} is not finished; the same command goes on")
            return None
        self.left = None if self.left is None else self.left - count * len(scales)
        before |= points
        figures = {scale: point.result.figure(self.figure.key) for scale, point in sorted(before.items())}
        shown = ", ".join(f"{scale:g} -> {value:.4g}" for scale, value in figures.items())
        self._note(f"{title}, {count} images, {self.figure.heading} at scale {shown}; best {self._best(figures):g}")
        return figures

    def _best(self, figures: dict[float, float]) -> float:
        """Return the scale with the best figure."""
        return self.figure.best(figures, key=figures.__getitem__)

    def _measured(self, points: list[Measurement]) -> list[Measurement]:
        """Measure, and wait for what other processes have begun; return what is complete."""
        done = self.evaluation.measure(points, self.rank, self.world_size, self.deadline)
        while self.world_size > 1 and len(done) < len(points) and not self.deadline.over:
            time.sleep(0.2)
            done = [point for point in points if point.finalize()]
        return done

    def _note(self, line: str) -> None:
        """Add a line to the log, and print it."""
        self.log.append(line)
        if self.rank == 0:
            print(line)


def _at_scale(sampling: Sampling, scale: float) -> Sampling:
    """Return the same sampling at another guidance scale; at 1 no guiding branch runs."""
    return sampling.guided(replace(sampling.guidance.settings, scale=scale).canonical)


def _neighbours(best: float, known: Sequence[float]) -> list[float]:
    """Return the scales on either side of ``best`` among those that are known."""
    at = known.index(best)
    return [known[other] for other in (at - 1, at + 1) if 0 <= other < len(known)]


def _middles(best: float, known: Sequence[float]) -> list[float]:
    """Return the scales halfway from ``best`` to its neighbours among the scales that are known."""
    return [round((best + other) / 2, 4) for other in _neighbours(best, known)]


def write_log(evaluation: Evaluation, log: Sequence[str]) -> Path:
    """Write the log beside the results."""
    path = evaluation.out / "search.log"
    if not rank():
        write_text(path, "\n".join(log) + "\n")
    return path
