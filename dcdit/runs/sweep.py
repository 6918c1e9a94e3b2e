"""Sweeps: directories named by what varies, and a summary at the end. Hydra calls it, see ``configs/train.yaml``."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict
from rich.table import Table

from dcdit.runs.progress import RunProgress, format_state, print_reasons, print_table, progress_of, runs_below
from dcdit.runs.state import State
from dcdit.runtime.display import Console
from dcdit.runtime.files import write_csv
from dcdit.settings.overrides import quoted

SUMMARY = "summary.csv"


def constant_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of those overrides that have one value in all jobs of a sweep."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.get_key_element().lstrip("+~") for override in parsed if not override.is_sweep_override()]


def is_single_run(config: DictConfig) -> bool:
    """Whether a sweep varies nothing: one run that is submitted to a cluster, or was started with ``-m``."""
    overrides = list(config.hydra.overrides.task)
    return len(constant_keys(overrides)) == len(overrides) and not config.hydra.sweeper.get("params")


class SweepSummary(Callback):
    """Names the directories of a sweep's runs by what varies, and sums them up when all have ended.

    The methods take open keywords, for Hydra promises to hand over more over time.
    """

    def on_multirun_start(self, config: DictConfig, **ignored: object) -> None:
        """Leave constant keys out of the names of directories."""
        constant = constant_keys(config.hydra.overrides.task)
        always = list(config.hydra.job.config.override_dirname.exclude_keys)
        names = ",".join(f'"{key}"' for key in dict.fromkeys([*always, *constant]))
        with open_dict(config):
            if is_single_run(config):
                config.hydra.overrides.hydra += quoted([f"hydra.sweep.dir={config.run_dir}", "hydra.sweep.subdir=."])
                config.hydra.sweep.dir, config.hydra.sweep.subdir = config.run_dir, "."
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{names}]")

    def on_multirun_end(self, config: DictConfig, **ignored: object) -> None:
        """Print and write the summary; the process ends with status 1 if a run has not finished."""
        folder = Path(config.hydra.sweep.dir)
        runs = [
            progress_of(path, path.name if path == folder else str(path.relative_to(folder)))
            for path in runs_below(folder)
        ]
        if not runs:
            return
        write_summary(runs, folder / SUMMARY)
        print_table(sweep_table(runs), Console())
        print_reasons(runs)
        unfinished = sum(run.state is not State.FINISHED for run in runs)
        print(f"{len(runs)} runs{f', {unfinished} of them not finished' if unfinished else ''}: {folder / SUMMARY}")
        if unfinished:
            raise SystemExit(1)


def write_summary(runs: Sequence[RunProgress], path: Path) -> None:
    """Write a CSV file with one row for each run."""
    metrics = sorted({name for run in runs for name in run.metrics})
    fields = ("step", "max_steps", "reason")
    rows = [
        {"run": run.name, "state": run.state.value, **{key: getattr(run, key) for key in fields}, **run.metrics}
        for run in runs
    ]
    write_csv(path, ["run", "state", *fields, *metrics], rows)


def sweep_table(runs: Sequence[RunProgress]) -> Table:
    """A table of the state and the final validation metrics of every run."""
    logged = {name for run in runs for name in run.metrics}
    # Without a validation, the table shows the training loss.
    metrics = sorted(name for name in logged if name.startswith("val/")) or sorted(logged & {"train/diffusion_loss"})
    table = Table(title="Sweep", title_justify="left")
    table.add_column("run", overflow="fold")
    for heading in ("state", "step", *(name.removeprefix("val/") for name in metrics)):
        table.add_column(heading, justify="right")
    for run in runs:
        values = [f"{run.metrics[name]:.4g}" if name in run.metrics else "-" for name in metrics]
        table.add_row(run.name, format_state(run.state), str(run.step), *values)
    return table
