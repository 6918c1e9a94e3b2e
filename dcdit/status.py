"""How far runs are: ``python -m dcdit.status runs/b_n4_sweep``. Reads their directories alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcdit.errors import UserError
from dcdit.runs.progress import Progress, progress_of, runs_below
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked

_COLOURS = {
    "queued": "blue",
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "died": "red",
}


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        runs: directories of runs, or folders with runs below them.
    """

    runs: list[str]


def duration(seconds: float | None) -> str:
    """Hours and minutes, or minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def table(found: Sequence[Progress]) -> Table:
    """One line for each run."""
    shown = Table(show_lines=False)
    shown.add_column("run", overflow="fold")
    for heading in ("state", "step", "loss", "images/s", "left"):
        shown.add_column(heading, justify="right")
    for each in found:
        colour = _COLOURS.get(each.state, "white")
        steps = f"{each.step:,} of {each.max_steps:,}" if each.max_steps else f"{each.step:,}"
        loss = "-" if each.loss is None else f"{each.loss:.4g}"
        rate = "-" if each.rate is None else f"{each.rate:,.0f}"
        shown.add_row(escape(each.name), f"[{colour}]{each.state}[/]", steps, loss, rate, duration(each.seconds_left))
    return shown


def run(config: DictConfig) -> list[Progress]:
    """Print the table; returns what is in it."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    request = call_checked(Request, values, "")
    found, several = [], len(request.runs) > 1  # the names of one folder's runs need not repeat it
    for place in map(Path, request.runs):
        if not place.is_dir():
            raise UserError(f"runs={place} is no directory")
        named = {
            path: str(path) if several or path == place else str(path.relative_to(place)) for path in runs_below(place)
        }
        found += [progress_of(path, name) for path, name in named.items()]
    if not found:
        raise UserError(f"runs={', '.join(request.runs)}: no runs there, python -m dcdit.train makes them")
    Console().print(table(found))
    for each in found:
        if each.reason:
            print(f"{each.name}: {each.reason}")
    return found


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="status")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main, paths=True)
