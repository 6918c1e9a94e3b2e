"""How far a run is, from its directory alone."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dcdit.errors import UserError
from dcdit.runs.history import history_of, sparkline
from dcdit.runs.lock import is_held
from dcdit.runs.state import QUEUED_NAME, STATE_NAME, RunState, State

_LONGEST_REASON = 2000
"""Characters; the file may hold anything."""


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
        losses: the course of the loss.
        keep_ratio: the last logged; None without router.
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
    losses: Sequence[float] = ()
    keep_ratio: float | None = None

    @property
    def steps(self) -> str:
        """Done, and of how many, for people."""
        return f"{self.step:,} of {self.max_steps:,}" if self.max_steps else f"{self.step:,}"


def progress_of(run_dir: Path, name: str) -> RunProgress:
    """Look at a run."""
    try:
        known = RunState.read(run_dir)
    except UserError as error:
        known = RunState(State.CORRUPT, reason=str(error))
    history = history_of(run_dir)
    last = history.last
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
        known.reason[:_LONGEST_REASON] if known else "",
        {**metrics, **(known.metrics if known else {})},
        history.values("train/diffusion_loss"),
        last.get("train/keep_ratio"),
    )


def runs_below(folder: Path) -> list[Path]:
    """Directories of runs in and below ``folder``, by name."""
    return sorted({path.parent for name in (STATE_NAME, QUEUED_NAME) for path in folder.rglob(name)})


def named_runs(places: Sequence[str]) -> dict[Path, str]:
    """Directories of runs in and below ``places``, each once, and its name: below its place where there is only one."""
    found: dict[Path, tuple[Path, str]] = {}
    for place in filter(Path.is_dir, map(Path, places)):
        for path in runs_below(place):
            name = str(path) if len(places) > 1 or path == place else str(path.relative_to(place))
            found.setdefault(path.resolve(), (path, name))
    return dict(found.values())


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
        state = Text(each.state.value, each.state.colour)
        loss = "-" if each.loss is None else f"{each.loss:.4g}"
        rate = "-" if each.rate is None else f"{each.rate:,.0f}"
        shown.add_row(each.name, state, each.steps, loss, rate, duration(each.seconds_left))
    return shown


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below ``folder``; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return total


def bytes_words(size: float) -> str:
    """For people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _logarithms(values: Sequence[float]) -> Sequence[float]:
    """In which a loss still falls long after its first steps; themselves if one is not positive."""
    return [math.log(value) for value in values] if min(values, default=0.0) > 0 else values


def live_view(found: Sequence[RunProgress], sizes: Sequence[int], free: int, time: str) -> Group:
    """What is to be seen while runs go on: two lines for each run, for terminals of 80 characters and more.

    Args:
        found: the runs.
        sizes: bytes that each has on disk.
        free: bytes that are free there.
        time: of day.
    """
    parts: list[Table | Text] = []
    for each, size in zip(found, sizes, strict=True):
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1, overflow="fold")
        for _ in range(3):
            head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(max(1, each.max_steps), each.step, width=16)
        head.add_row(Text(each.name, "bold"), Text(each.state.value, each.state.colour), each.steps, bar)
        words = [
            "no loss yet" if each.loss is None else f"loss {each.loss:.4g} {sparkline(_logarithms(each.losses), 16)}"
        ]
        words += [] if each.keep_ratio is None else [f"kept {each.keep_ratio:.1%}"]
        words += [] if each.rate is None else [f"{each.rate:,.0f} images/s"]
        words += [] if each.seconds_left is None else [f"{duration(each.seconds_left)} left"]
        parts += [head, Text("  " + "   ".join([*words, bytes_words(size)]))]
    return Group(
        *parts, Text(f"{time}   {bytes_words(free)} free on disk   Ctrl-C ends this, not the runs", style="dim")
    )
