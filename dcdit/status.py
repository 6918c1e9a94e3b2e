"""How far runs are: ``python -m dcdit.status runs``; live with ``--watch``. Reads their directories alone."""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from rich.live import Live

from dcdit.checks import Bounds, NotEmpty, config
from dcdit.errors import UserError
from dcdit.runs.progress import (
    RunProgress,
    live_view,
    named_runs,
    progress_of,
    progress_table,
    size_on_disk,
)
from dcdit.runs.state import State
from dcdit.runtime.display import Console
from dcdit.runtime.terminal import lost
from dcdit.settings.command import command


@config
class StatusConfig:
    """What to look at: the keys of ``configs/status.yaml``.

    Attributes:
        runs: directories of runs, or folders with runs below them.
        watch: look again and again, until runs that went on or waited have ended.
        every: seconds between two looks.
    """

    runs: Annotated[list[str], NotEmpty("name a folder, such as runs")]
    watch: bool
    every: Annotated[float, Bounds(0.2, 3600, hint="seconds between two looks")]


def look(config: StatusConfig) -> dict[Path, RunProgress]:
    """How far the runs are, by their directories; UserError if there are none."""
    for place in config.runs:
        if not Path(place).is_dir():
            raise UserError(f"runs={place} is no directory")
    found = {path: progress_of(path, name) for path, name in named_runs(config.runs).items()}
    if not found:
        raise UserError(f"runs={', '.join(config.runs)}: no runs there, python -m dcdit.train makes them")
    return found


@command("status", paths=True, flags={"--watch": "watch=true"})
def status(config: StatusConfig) -> list[RunProgress]:
    """Print the table, or keep it up to date; returns what is in it."""
    console = Console()
    if config.watch:
        found = watch(config, console)
    else:
        found = look(config)
        console.print(progress_table(list(found.values())))
    for each in found.values():
        if each.reason:
            print(f"{each.name}: {each.reason}")
    return list(found.values())


def watch(config: StatusConfig, console: Console) -> dict[Path, RunProgress]:
    """Keep a view up to date until runs that went on or waited have ended, or Ctrl-C; returns what was seen last.

    Where none goes on yet, one may be starting: it waits.
    """
    found: dict[Path, RunProgress] = {}
    went_on = False
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            with suppress(UserError):  # no folder yet, or no run
                found = look(config)
            goes_on = bool({State.RUNNING, State.QUEUED, State.WAITING} & {each.state for each in found.values()})
            sizes = [size_on_disk(path) for path in found]
            free = shutil.disk_usage(next(iter(found), Path())).free
            now = time.strftime("%H:%M:%S") + ("" if goes_on or went_on else "   waiting for a run to go on")
            live.update(live_view(list(found.values()), sizes, free, now), refresh=True)
            if (went_on and not goes_on) or lost(sys.stdout):
                break
            went_on = goes_on
            time.sleep(config.every)
    return found


if __name__ == "__main__":
    status.main()
