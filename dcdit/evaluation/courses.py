"""How runs went that are reported: their curves, and the pictures of their validations."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcdit.evaluation.results import is_png
from dcdit.runs.history import History, history_of, means
from dcdit.runs.progress import RunProgress, format_duration, named_runs, progress_of
from dcdit.runs.state import RunState

_FID = re.compile(r"val/fid@(.+)")
_PICTURES, _POINTS = 4, 300
LARGEST = 20
"""Runs in one plot."""


@dataclass(frozen=True)
class Course:
    """A run, as far as it went.

    Attributes:
        name: below the folder that was asked about.
        path: its directory.
        progress: how far it is.
        history: what it logged.
        target: the keep ratio that was asked for; None if that is not known.
    """

    name: str
    path: Path
    progress: RunProgress
    history: History
    target: float | None

    @property
    def cells(self) -> list[str]:
        """Its line in a table: state, steps, loss, tokens kept, images/s, time left."""
        now = self.progress
        return [
            now.state.value,
            now.steps,
            "-" if now.loss is None else f"{now.loss:.4g}",
            "-" if now.keep_ratio is None else f"{now.keep_ratio:.1%}",
            "-" if now.rate is None else f"{now.rate:,.0f}",
            format_duration(now.seconds_left),
        ]

    @property
    def pictures(self) -> list[Path]:
        """Of its validations: samples from the first to the last, four at most, and the last boundaries."""
        folder = self.path / "validation"
        samples = [path for path in sorted(folder.glob("step_*_samples.png")) if is_png(path)]
        last = max(1, len(samples) - 1)
        chosen = [
            samples[round(last * place / (_PICTURES - 1))] for place in range(_PICTURES) if len(samples) > _PICTURES
        ]
        boundaries = [path for path in sorted(folder.glob("step_*_boundaries.png")) if is_png(path)]
        return [*(chosen or samples), *boundaries[-1:]]


@dataclass(frozen=True)
class Line:
    """One curve of a plot.

    Attributes:
        run: number of the run, for its colour.
        label: for people.
        steps, values: of the curve.
        marked: whether it is of few points, which are marked.
    """

    run: int
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool


def courses_below(places: Sequence[str]) -> list[Course]:
    """The runs in and below ``places`` that logged anything, by name."""
    found = []
    for path, name in named_runs(places).items():
        history = history_of(path)
        if history.courses:
            found.append(Course(name, path, progress_of(path, name), history, _target(path)))
    return found


def _target(path: Path) -> float | None:
    """1 / N, if the run says it."""
    try:
        known = RunState.read(path)
    except ValueError:
        return None
    compression = (known.settings if known else {}).get("compression")
    return 1 / compression if isinstance(compression, int | float) and compression else None


def lines(courses: Sequence[Course]) -> dict[str, list[Line]]:
    """What is drawn: for each plot, by what stands at its side, the curves; plots without any are left out."""
    found: dict[str, list[Line]] = {"diffusion loss": [], "keep ratio": [], "FID at validations": []}
    for number, course in enumerate(courses[:LARGEST]):
        for title, key in (("diffusion loss", "train/diffusion_loss"), ("keep ratio", "train/keep_ratio")):
            steps, values = course.history.courses.get(key, ((), ()))
            if steps:
                shown = Line(number, course.name, means(steps, _POINTS), means(values, _POINTS), False)
                found[title].append(shown)
        steps, values = course.history.courses.get("val/diffusion_loss", ((), ()))
        if steps:
            found["diffusion loss"].append(Line(number, f"{course.name}, validation", steps, values, True))
        for key, (steps, values) in course.history.courses.items():
            if at := _FID.fullmatch(key):
                found["FID at validations"].append(Line(number, f"{course.name}, ρ {at[1]}", steps, values, True))
    return {title: each for title, each in found.items() if each}
