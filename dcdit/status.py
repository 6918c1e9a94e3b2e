"""Show how far runs are: ``python -m dcdit.status runs``; live with ``--watch``. It only reads their directories."""

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
    print_reasons,
    print_table,
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
    """The configuration of ``dcdit.status``; ``configs/status.yaml`` describes each key."""

    runs: Annotated[list[str], NotEmpty("name a folder, such as runs")]
    watch: bool
    every: Annotated[float, Bounds(0.2, 3600, hint="seconds between two looks")]


def read_progress(config: StatusConfig) -> dict[Path, RunProgress]:
    """How far the runs are, by their directories; UserError if there are none."""
    for folder in config.runs:
        if not Path(folder).is_dir():
            raise UserError(f"runs={folder} is no directory")
    runs = {path: progress_of(path, name) for path, name in named_runs(config.runs).items()}
    if not runs:
        raise UserError(f"runs={', '.join(config.runs)}: no runs there, python -m dcdit.train makes them")
    return runs


@command("status", paths=True, flags={"--watch": "watch=true"}, plugins=False)
def status(config: StatusConfig) -> list[RunProgress]:
    """Print a table of the runs, or keep a view of them up to date; returns how far they are."""
    console = Console()
    if config.watch:
        runs = list(watch(config, console).values())
    else:
        runs = list(read_progress(config).values())
        print_table(progress_table(runs), console)
    print_reasons(runs)
    return runs


def watch(config: StatusConfig, console: Console) -> dict[Path, RunProgress]:
    """Keep a view up to date until all runs have ended, or until Ctrl-C; returns what was shown last.

    As long as no run has begun it waits, for one may be starting.
    """
    runs: dict[Path, RunProgress] = {}
    went_on = False
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            with suppress(UserError):  # no folder yet, or no run
                runs = read_progress(config)
            goes_on = bool({State.RUNNING, State.QUEUED, State.WAITING} & {run.state for run in runs.values()})
            sizes = [size_on_disk(path) for path in runs]
            free = shutil.disk_usage(next(iter(runs), Path())).free
            now = time.strftime("%H:%M:%S") + ("" if goes_on or went_on else "   waiting for a run to go on")
            live.update(live_view(list(runs.values()), sizes, free, now), refresh=True)
            if (went_on and not goes_on) or lost(sys.stdout):
                break
            went_on = goes_on
            time.sleep(config.every)
    return runs


if __name__ == "__main__":
    status.main()
