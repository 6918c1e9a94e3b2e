"""How far runs are: ``python -m dcdit.status runs/b_n4_sweep``. Reads their directories alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import hydra
from omegaconf import DictConfig
from rich.console import Console

from dcdit.checks import NotEmpty, call_checked, checked
from dcdit.errors import UserError
from dcdit.runs.progress import RunProgress, progress_of, progress_table, runs_below
from dcdit.settings.entry import CONFIG_DIR, entry_point, hold, plain


@checked
@dataclass(frozen=True)
class StatusSettings:
    """What to look at: the keys of ``configs/status.yaml``.

    Attributes:
        runs: directories of runs, or folders with runs below them.
    """

    runs: Annotated[list[str], NotEmpty("name a folder, such as runs")]


def check(config: DictConfig) -> StatusSettings:
    """What ``config`` asks for; UserError if a value is wrong, before anything is read."""
    return call_checked(StatusSettings, plain(config), "")


def run(config: DictConfig) -> list[RunProgress]:
    """Print the table; returns what is in it."""
    settings = check(config)
    found, several = [], len(settings.runs) > 1  # the names of one folder's runs need not repeat it
    seen: set[Path] = set()
    for place in map(Path, settings.runs):
        if not place.is_dir():
            raise UserError(f"runs={place} is no directory")
        for path in runs_below(place):
            if path.resolve() not in seen:
                name = str(path) if several or path == place else str(path.relative_to(place))
                found.append(progress_of(path, name))
                seen.add(path.resolve())
    if not found:
        raise UserError(f"runs={', '.join(settings.runs)}: no runs there, python -m dcdit.train makes them")
    Console().print(progress_table(found))
    for each in found:
        if each.reason:
            print(f"{each.name}: {each.reason}")
    return found


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="status")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main, paths=True)
