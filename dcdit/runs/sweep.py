"""Sweeps: directories named by what varies, and a summary at the end. Hydra calls it, see ``configs/train.yaml``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict
from rich.table import Table
from rich.text import Text

from dcdit.runs.progress import RunProgress, progress_of, runs_below
from dcdit.runs.state import State
from dcdit.runtime.display import Console
from dcdit.runtime.files import write_csv
from dcdit.settings.overrides import quoted

SUMMARY = "summary.csv"


def constant_keys(overrides: Sequence[str]) -> list[str]:
    """Keys of the overrides that are the same in all jobs of a sweep."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.get_key_element().lstrip("+~") for override in parsed if not override.is_sweep_override()]


def single(config: DictConfig) -> bool:
    """Whether nothing varies: one run, submitted or started as a sweep."""
    tasks = list(config.hydra.overrides.task)
    return len(constant_keys(tasks)) == len(tasks) and not config.hydra.sweeper.get("params")


class SweepSummary(Callback):
    """Names the directories of a sweep's runs by what varies, and sums them up when all have ended.

    The open keywords are those of Hydra's interface, which promises to hand over more over time.
    """

    def on_multirun_start(self, config: DictConfig, **ignored: Any) -> None:
        """Leave what does not vary out of the names."""
        constant = constant_keys(config.hydra.overrides.task)
        always = list(config.hydra.job.config.override_dirname.exclude_keys)
        names = ",".join(f'"{key}"' for key in dict.fromkeys([*always, *constant]))
        with open_dict(config):
            if single(config):
                config.hydra.overrides.hydra += quoted([f"hydra.sweep.dir={config.run_dir}", "hydra.sweep.subdir=."])
                config.hydra.sweep.dir, config.hydra.sweep.subdir = config.run_dir, "."
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{names}]")

    def on_multirun_end(self, config: DictConfig, **ignored: Any) -> None:
        """Print and write the summary."""
        folder = Path(config.hydra.sweep.dir)
        runs = {path: path.name if path == folder else str(path.relative_to(folder)) for path in runs_below(folder)}
        found = [progress_of(path, name) for path, name in runs.items()]
        if found:
            write_summary(found, folder / SUMMARY)
            Console().print(sweep_table(found))
            for each in found:
                if each.reason:
                    print(f"{each.name}: {each.reason}")
            missing = sum(each.state is not State.FINISHED for each in found)
            words = f", {missing} of them not finished" if missing else ""
            print(f"{len(found)} runs{words}: {folder / SUMMARY}")
            if missing:
                raise SystemExit(1)


def write_summary(found: Sequence[RunProgress], path: Path) -> None:
    """One row for each run, as CSV."""
    metrics = sorted({name for each in found for name in each.metrics})
    columns = ["run", "state", "step", "max_steps", "reason", *metrics]
    rows = []
    for each in found:
        fixed = (each.name, each.state.value, each.step, each.max_steps, each.reason)
        rows.append({**dict(zip(columns, fixed, strict=False)), **each.metrics})
    write_csv(path, columns, rows)


def sweep_table(found: Sequence[RunProgress]) -> Table:
    """State and final validation metrics of every run, for people."""
    known = {name for each in found for name in each.metrics}
    # without a validation, what there is of training
    metrics = sorted(name for name in known if name.startswith("val/")) or sorted(known & {"train/diffusion_loss"})
    table = Table(title="Sweep", title_justify="left")
    table.add_column("run", overflow="fold")
    for heading in ("state", "step", *(name.removeprefix("val/") for name in metrics)):
        table.add_column(heading, justify="right")
    for each in found:
        values = [f"{each.metrics[name]:.4g}" if name in each.metrics else "-" for name in metrics]
        state = Text(each.state.value, each.state.colour)
        table.add_row(each.name, state, str(each.step), *values)
    return table
