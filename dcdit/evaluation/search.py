"""The best guidance scale at each budget: few images first, more near the optimum."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcdit.evaluation.measure import Deadline, Measurement
from dcdit.evaluation.points import Evaluation
from dcdit.evaluation.settings import figures_of_metrics
from dcdit.evaluation.words import budget_words
from dcdit.runtime.files import write_text
from dcdit.sampling.setup import Sampling

_SHARES = (10, 3, 1)
"""Images of a round are the count divided by these; each round looks around the best of the one before."""


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        last: measurements of the last round at each budget, complete ones.
        log: every round in words.
        complete: whether all was measured.
    """

    last: list[Measurement]
    log: list[str]
    complete: bool


def search(
    evaluation: Evaluation, samplings: Sequence[Sampling], rank: int, world_size: int, deadline: Deadline
) -> Searched:
    """Find the best guidance scale at each budget, between the scales of ``samplings``.

    The first round measures these scales with a tenth of the images, the second the best of them and the middles
    towards its neighbours with a third, the last the same around the best of the second with all images.

    Args:
        evaluation: what is shared.
        samplings: every budget at every scale to begin with.
        rank, world_size: of this process; it waits for what others measure.
        deadline: no chunk is begun after it.
    """
    budgets: dict[str, Sampling] = {}
    for each in samplings:
        if each.guidance.settings.scale != 1:
            plan = replace(each.plan, guidance=replace(each.plan.guidance, scale=2.0))
            budgets.setdefault(repr(plan), each)
    scales = sorted({each.guidance.settings.scale for each in samplings})
    looking = _Search(evaluation, rank, world_size, deadline)
    complete = all(looking.at_budget(sampling, scales) for sampling in budgets.values())
    return Searched(looking.last, looking.log, complete)


class _Search:
    """What is known so far; arguments as of :func:`search`."""

    def __init__(self, evaluation: Evaluation, rank: int, world_size: int, deadline: Deadline) -> None:
        self.evaluation, self.rank, self.world_size, self.deadline = evaluation, rank, world_size, deadline
        self.figure = figures_of_metrics(evaluation.metrics)[0]
        self.left = evaluation.settings.max_images
        self.last: list[Measurement] = []
        self.log: list[str] = []

    def at_budget(self, sampling: Sampling, scales: Sequence[float]) -> bool:
        """All rounds at one budget; whether they are complete."""
        known, now = sorted(scales), list(scales)
        words, settings = budget_words(self.evaluation.of(sampling).plan), self.evaluation.settings
        for number, share in enumerate(_SHARES, 1):
            count = max(settings.count // share, min(self.evaluation.least, settings.count))
            if self.left is not None and self.left < count * len(now):
                return self._note(f"{words}: stopped before round {number}, max_images={settings.max_images}", False)
            points = [self.evaluation.of(_at_scale(sampling, scale), count) for scale in now]
            if len(self._measured(points)) < len(points):
                return self._note(f"{words}: round {number} is not finished; the same command goes on", False)
            self.left = None if self.left is None else self.left - count * len(now)
            figures = [each.result.values["metrics"][self.figure.key] for each in points]
            found = dict(zip(now, figures, strict=True))
            best = (max if self.figure.higher_is_better else min)(found, key=lambda scale: found[scale])
            shown = ", ".join(f"{scale:g} -> {value:.4g}" for scale, value in found.items())
            end = number == len(_SHARES) and best in (known[0], known[-1])
            self._note(
                f"{words}: round {number}, {count} images, {self.figure.heading} at scale {shown}; best {best:g}"
                + (", the end of what was looked at: try scales beyond" if end else "")
            )
            if number == len(_SHARES):
                self.last += points
            now = sorted({best, *_middles(best, known)})
            known = sorted({*known, *now})
        return True

    def _measured(self, points: list[Measurement]) -> list[Measurement]:
        """Measure, and wait for what other processes have begun; returns what is complete."""
        done = self.evaluation.measure(points, self.rank, self.world_size, self.deadline)
        while self.world_size > 1 and len(done) < len(points) and not self.deadline.over:
            time.sleep(0.2)
            done = [each for each in points if each.finalize()]
        return done

    def _note(self, words: str, complete: bool = True) -> bool:
        """Into the log; hands ``complete`` through."""
        self.log.append(words)
        if self.rank == 0:
            print(words)
        return complete


def _at_scale(sampling: Sampling, scale: float) -> Sampling:
    """The same at another guidance scale; 1 runs no weak half."""
    settings = replace(sampling.guidance.settings, scale=scale)
    if scale == 1:
        settings = replace(settings, uncond_drop_fraction=None, weak=None, weak_checkpoint=None)
    return sampling.guided(settings)


def _middles(best: float, known: Sequence[float]) -> list[float]:
    """Halfway from ``best`` to its neighbours among the scales that are known."""
    at = known.index(best)
    beside = [known[other] for other in (at - 1, at + 1) if 0 <= other < len(known)]
    return [round((best + other) / 2, 4) for other in beside]


def write_log(evaluation: Evaluation, log: Sequence[str]) -> Path:
    """Keep the log beside the results."""
    path = evaluation.out / "search.log"
    write_text(path, "\n".join(log) + "\n")
    return path
