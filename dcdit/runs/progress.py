"""How far a run is, from its directory alone."""

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from dcdit.errors import UserError
from dcdit.runs.lock import is_held
from dcdit.runs.state import QUEUED_NAME, STATE_NAME, RunState, State


@dataclass(frozen=True)
class RunProgress:
    """How far a run is, from its directory alone.

    Attributes:
        name: of the run, below the folder that was asked about.
        state: queued if a job waits for its turn, lost if it says running and no process is, waiting if it has not
            begun, corrupt if its file cannot be read.
        step, max_steps: optimiser steps.
        loss: the diffusion loss of training: of the last step if the run has ended, else the last logged.
        rate: images per second, the last logged.
        seconds_left: at that rate; None if nothing tells.
        reason: of a failure.
        metrics: the last value of each validation metric; at the end of a run, of every metric.
    """

    name: str
    state: State
    step: int
    max_steps: int
    loss: float | None
    rate: float | None
    seconds_left: float | None
    reason: str
    metrics: Mapping[str, float]


def progress_of(run_dir: Path, name: str) -> RunProgress:
    """Look at a run."""
    try:
        known = RunState.read(run_dir)
    except UserError as error:
        known = RunState(State.CORRUPT, reason=str(error))
    last = _last_logged(run_dir)
    state, held = known.state if known else State.WAITING, is_held(run_dir)
    if not held and (run_dir / QUEUED_NAME).exists():
        state = State.QUEUED
    elif state is State.RUNNING and not held:
        state = State.LOST
    step = max(known.step if known else 0, int(last.get("step", -1)) + 1)
    if known and known.state not in (State.RUNNING, State.CORRUPT):
        step = known.step
    max_steps = known.max_steps if known else 0
    rate, batch = last.get("train/images_per_s"), known.batch_size if known else 0
    left = (max_steps - step) * batch / rate if rate and batch and state is State.RUNNING else None
    metrics = {key: value for key, value in last.items() if key.startswith("val/")}
    return RunProgress(
        name,
        state,
        step,
        max_steps,
        (known.metrics if known else {}).get("train/diffusion_loss", last.get("train/diffusion_loss")),
        rate,
        left,
        known.reason if known else "",
        {**metrics, **(known.metrics if known else {})},
    )


def _last_logged(run_dir: Path) -> dict[str, float]:
    """The last value of every column of the run's CSV logs, later files winning; empty without any."""
    found: dict[str, float] = {}
    versions = {path: path.parent.name.removeprefix("version_") for path in run_dir.glob("logs/version_*/metrics.csv")}
    files = sorted((path for path in versions if versions[path].isdecimal()), key=lambda path: int(versions[path]))
    for path in files:
        with suppress(OSError, UnicodeDecodeError, csv.Error), path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    with suppress(TypeError, ValueError):  # empty, cut off, or a line too long
                        if isinstance(key, str) and math.isfinite(number := float(value)):
                            found[key] = number
    return found


def runs_below(folder: Path) -> list[Path]:
    """Directories of runs in and below ``folder``, by name."""
    return sorted({path.parent for name in (STATE_NAME, QUEUED_NAME) for path in folder.rglob(name)})


def duration(seconds: float | None) -> str:
    """Hours and minutes, or minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def progress_table(found: Sequence[RunProgress]) -> Table:
    """One line for each run."""
    shown = Table(show_lines=False)
    shown.add_column("run", overflow="fold")
    for heading in ("state", "step", "diffusion loss", "images/s", "left"):
        shown.add_column(heading, justify="right")
    for each in found:
        state = f"[{each.state.colour}]{each.state.value}[/]"
        steps = f"{each.step:,} of {each.max_steps:,}" if each.max_steps else f"{each.step:,}"
        loss = "-" if each.loss is None else f"{each.loss:.4g}"
        rate = "-" if each.rate is None else f"{each.rate:,.0f}"
        shown.add_row(escape(each.name), state, steps, loss, rate, duration(each.seconds_left))
    return shown
