"""How far a run is, from its directory alone."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.measure import measure_renderables
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dcdit.errors import UserError
from dcdit.runs.history import history_of, sparkline
from dcdit.runs.lock import is_held
from dcdit.runs.state import QUEUED_NAME, STATE_NAME, RunState, State
from dcdit.runtime.display import Console

_LONGEST_REASON = 2000
"""Characters; the file may hold anything."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run is, from its directory alone.

    Attributes:
        name: of the run, below the folder that was asked about.
        state: queued if a job waits for its turn, lost if it says running and no process is, waiting if it has not
            begun, corrupt if its file cannot be read.
        loss: the diffusion loss of training: of the last step if the run has ended, else the last logged.
        rate: images per second, the last logged.
        seconds_left: at that rate; None if nothing tells.
        metrics: the last value of each validation metric; at the end of a run, of every metric.
        losses: the loss at all logged steps.
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
        """The steps done and the steps of the whole run, as text."""
        return f"{self.step:,} of {self.max_steps:,}" if self.max_steps else f"{self.step:,}"


def progress_of(run_dir: Path, name: str) -> RunProgress:
    """How far the run in ``run_dir`` is; ``name`` is what tables call it."""
    try:
        recorded = RunState.read(run_dir) or RunState(State.WAITING)
    except UserError as error:
        recorded = RunState(State.CORRUPT, reason=str(error))
    history = history_of(run_dir)
    last = history.last
    state, held = recorded.state, is_held(run_dir)
    if not held and (run_dir / QUEUED_NAME).exists():
        state = State.QUEUED
    elif state is State.RUNNING and not held:
        state = State.LOST
    step = recorded.step
    if recorded.state in (State.WAITING, State.RUNNING, State.CORRUPT):
        step = max(step, int(last.get("step", -1)) + 1)
    rate = last.get("train/images_per_s")
    left = None
    if rate and recorded.batch_size and state is State.RUNNING:
        left = (recorded.max_steps - step) * recorded.batch_size / rate
    return RunProgress(
        name=name,
        state=state,
        step=step,
        max_steps=recorded.max_steps,
        loss=recorded.metrics.get("train/diffusion_loss", last.get("train/diffusion_loss")),
        rate=rate,
        seconds_left=left,
        reason=recorded.reason[:_LONGEST_REASON],
        metrics={**{key: value for key, value in last.items() if key.startswith("val/")}, **recorded.metrics},
        losses=history.values("train/diffusion_loss"),
        keep_ratio=last.get("train/keep_ratio"),
    )


def runs_below(folder: Path) -> list[Path]:
    """The directories of runs in and below ``folder``, sorted by name."""
    return sorted({path.parent for name in (STATE_NAME, QUEUED_NAME) for path in folder.rglob(name)})


def named_runs(folders: Sequence[str]) -> dict[Path, str]:
    """The directories of runs in and below ``folders``, without repetition, and the names of the runs.

    A name is the path below the folder if there is only one folder, else the whole path.
    """
    runs: dict[Path, tuple[Path, str]] = {}
    for folder in filter(Path.is_dir, map(Path, folders)):
        for path in runs_below(folder):
            name = str(path) if len(folders) > 1 or path == folder else str(path.relative_to(folder))
            runs.setdefault(path.resolve(), (path, name))
    return dict(runs.values())


def format_duration(seconds: float | None) -> str:
    """A duration in hours and minutes, or in minutes and seconds; ``-`` for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


_COLOURS = {
    State.WAITING: "white",
    State.QUEUED: "blue",
    State.RUNNING: "cyan",
    State.FINISHED: "green",
    State.INTERRUPTED: "yellow",
}


def format_state(state: State) -> Text:
    """The name of a state, coloured; red if something is wrong."""
    return Text(state.value, _COLOURS.get(state, "red"))


def progress_table(runs: Sequence[RunProgress]) -> Table:
    """A table with one line for each run."""
    table = Table(show_lines=False)
    table.add_column("run", overflow="fold")
    for heading in ("state", "step", "diffusion loss", "images/s", "left"):
        table.add_column(heading, justify="right")
    for run in runs:
        loss = "-" if run.loss is None else f"{run.loss:.4g}"
        rate = "-" if run.rate is None else f"{run.rate:,.0f}"
        table.add_row(run.name, format_state(run.state), run.steps, loss, rate, format_duration(run.seconds_left))
    return table


def print_table(table: Table, console: Console) -> None:
    """Print a table whose first column may be folded; as a line for each row where the others would not fit."""
    cells = [[column.header, *column.cells] for column in table.columns]
    widths = [measure_renderables(console, console.options, column).minimum for column in cells]
    if min(widths[0], 8) + sum(widths[1:]) + 3 * len(widths) + 1 <= console.width:  # 3: a border and its padding
        console.print(table)
        return
    (_, *headings), *rows = zip(*cells, strict=True)
    for name, *values in rows:
        print(f"{name}: {', '.join(f'{heading} {value}' for heading, value in zip(headings, values, strict=True))}")


def print_reasons(runs: Sequence[RunProgress]) -> None:
    """Print why runs failed, a line for each."""
    for run in runs:
        if run.reason:
            print(f"{run.name}: {run.reason}")


def size_on_disk(folder: Path) -> int:
    """The bytes of all files below ``folder``; a file that vanishes meanwhile counts as empty."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return total


def format_bytes(size: float) -> str:
    """A number of bytes with a unit, such as ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _logarithms(values: Sequence[float]) -> Sequence[float]:
    """The logarithms of losses, which still show a fall late in a run; the losses themselves if one is not positive."""
    return [math.log(value) for value in values] if min(values, default=0.0) > 0 else values


def live_view(runs: Sequence[RunProgress], sizes: Sequence[int], free: int, time: str) -> Group:
    """The view that ``dcdit status --watch`` keeps up to date: two lines for each run, at least 80 characters wide.

    Args:
        sizes: bytes that each run has on disk.
        free: bytes that are free there.
        time: of day.
    """
    parts: list[Table | Text] = []
    for run, size in zip(runs, sizes, strict=True):
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1, overflow="fold")
        for _ in range(3):
            head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(max(1, run.max_steps), run.step, width=16)
        head.add_row(Text(run.name, "bold"), format_state(run.state), run.steps, bar)
        loss = "no loss yet" if run.loss is None else f"loss {run.loss:.4g} {sparkline(_logarithms(run.losses), 16)}"
        figures = [loss]
        figures += [] if run.keep_ratio is None else [f"kept {run.keep_ratio:.1%}"]
        figures += [] if run.rate is None else [f"{run.rate:,.0f} images/s"]
        figures += [] if run.seconds_left is None else [f"{format_duration(run.seconds_left)} left"]
        parts += [head, Text("  " + "   ".join([*figures, format_bytes(size)]))]
    hint = f"{time}   {format_bytes(free)} free on disk   Ctrl-C ends this, not the runs"
    return Group(*parts, Text(hint, style="dim"))
