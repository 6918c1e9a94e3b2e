"""How the reported runs went: their curves, and the pictures of their validations."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcdit.reporting.collect import is_png, result_files
from dcdit.runs.history import History, history_of, means
from dcdit.runs.progress import RunProgress, format_duration, named_runs, progress_of, runs_below
from dcdit.runs.resume import name_in_results
from dcdit.runs.state import RunState

_FID = re.compile(r"val/fid@(.+)")
_PICTURES, _POINTS = 4, 300
MOST_RUNS = 20
"""Most runs that are drawn in one plot."""


@dataclass(frozen=True)
class RunHistory:
    """How a run went so far.

    Attributes:
        name: as in results; its path where two runs have the same name.
        path: its directory.
        progress: how far it is.
        history: what it logged.
        target: the keep ratio that training aimed at; None if that is not known.
    """

    name: str
    path: Path
    progress: RunProgress
    history: History
    target: float | None

    @property
    def cells(self) -> list[str]:
        """Cells of the run's line in a table: state, steps, loss, tokens kept, images/s, time left."""
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
        """Pictures of the validations: samples from the first to the last, four at most, and the last boundaries."""
        folder = self.path / "validation"
        samples = [path for path in sorted(folder.glob("step_*_samples.png")) if is_png(path)]
        last = max(1, len(samples) - 1)
        chosen = [
            samples[round(last * number / (_PICTURES - 1))] for number in range(_PICTURES) if len(samples) > _PICTURES
        ]
        boundaries = [path for path in sorted(folder.glob("step_*_boundaries.png")) if is_png(path)]
        return [*(chosen or samples), *boundaries[-1:]]


@dataclass(frozen=True)
class Curve:
    """One curve of a plot over the steps of training.

    Attributes:
        run: number of the run, for its colour.
        label: in the legend.
        steps, values: of the curve.
        marked: whether its points are few, and are marked.
    """

    run: int
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool


def histories_below(paths: Sequence[str]) -> list[RunHistory]:
    """Return the histories of the runs in and below ``paths`` that logged anything, by name."""
    histories, paths_by_run = [], named_runs(paths)
    names = Counter(map(name_in_results, paths_by_run))
    for path, place in paths_by_run.items():
        short = name_in_results(path)
        name, history = short if names[short] == 1 else place, history_of(path)
        if history.courses:
            histories.append(RunHistory(name, path, progress_of(path, name), history, _target(path)))
    return histories


def runs_without_anything(paths: Sequence[str], histories: Sequence[RunHistory]) -> list[str]:
    """Return the names of the runs in and below ``paths``, and of the paths, that have neither curves nor results."""
    drawn = {history.path.resolve() for history in histories}
    empty = [name for path, name in named_runs(paths).items() if path.resolve() not in drawn and not result_files(path)]
    for place in dict.fromkeys(paths):
        folder = Path(place)
        known = {*drawn, *(path.resolve() for path in runs_below(folder))}
        if not result_files(folder) and not any(path.is_relative_to(folder.resolve()) for path in known):
            empty.append(place)
    return empty


def _target(path: Path) -> float | None:
    """Return 1 / N, if the run says N."""
    try:
        state = RunState.read(path)
    except ValueError:
        return None
    compression = (state.settings if state else {}).get("compression")
    return 1 / compression if isinstance(compression, int | float) and compression else None


def curves_of(histories: Sequence[RunHistory]) -> dict[str, list[Curve]]:
    """Return the curves of each plot, by the title of its vertical axis; plots without any curve are left out."""
    plots: dict[str, list[Curve]] = {"diffusion loss": [], "keep ratio": [], "FID at validations": []}
    for number, run in enumerate(histories[:MOST_RUNS]):
        for title, key in (("diffusion loss", "train/diffusion_loss"), ("keep ratio", "train/keep_ratio")):
            steps, values = run.history.courses.get(key, ((), ()))
            if steps:
                plots[title].append(Curve(number, run.name, means(steps, _POINTS), means(values, _POINTS), False))
        steps, values = run.history.courses.get("val/diffusion_loss", ((), ()))
        if steps:
            plots["diffusion loss"].append(Curve(number, f"{run.name}, validation", steps, values, True))
        for key, (steps, values) in run.history.courses.items():
            if match := _FID.fullmatch(key):
                plots["FID at validations"].append(Curve(number, f"{run.name}, ρ {match[1]}", steps, values, True))
    return {title: curves for title, curves in plots.items() if curves}
