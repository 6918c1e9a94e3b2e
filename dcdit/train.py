"""Train or resume: ``python -m dcdit.train experiment=digits``.

A run lives in ``runs/<run_name>``; ``ckpt_path=last`` goes on with it after a crash, a kill or Ctrl-C. With ``-m`` and
several values of a key the command runs a sweep, here or on a cluster.
"""

import math
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dcdit.cluster import job
from dcdit.errors import UserError
from dcdit.runs.failure import describe_failure, note_failure
from dcdit.runs.resume import resuming_command, task_overrides
from dcdit.runs.state import Outcome, State
from dcdit.runtime.processes import lost_process, rank, say
from dcdit.settings.entry import entry_point, explain, hold, plain, show
from dcdit.settings.published import CONFIG_DIR
from dcdit.training.settings import GROUPS, TrainPlan

PATIENCE = 180.0
"""Seconds that a job waits for the one before it to let go of the run: a node that died holds locks for a while."""


def check(config: DictConfig) -> TrainPlan:
    """What ``config`` asks for; UserError if a value is wrong, the network's and the callbacks' own apart."""
    return TrainPlan.of(plain(config, sections=GROUPS))


def run(config: DictConfig, run_dir: Path, sweeping: bool = False) -> Outcome:
    """Train what ``config`` asks for in ``run_dir``; returns how it ended."""
    plan = check(config)
    from dcdit.training.batching import check_local_sweep
    from dcdit.training.run import train

    if sweeping and not job.is_inside_job():
        check_local_sweep(plan)
    try:
        return train(config, run_dir, PATIENCE if job.is_inside_job() else 0.0, job.is_inside_job())
    except UserError:
        command = None if sweeping or plan.run.ckpt_path != "last" else resuming_command(run_dir, task_overrides())
        if command:  # apart from the message, whose frame would break it into lines
            say(f"{os.path.relpath(run_dir)} was started with other settings. To go on with those:\n{command}")
        raise


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="train")
def main(config: DictConfig) -> float | None:
    """Hydra entry point; returns the validation loss for sweepers that optimise it."""
    return hold(run_and_note, config)


def run_and_note(config: DictConfig) -> float | None:
    """Run what ``config`` asks for, and write down how it ended where that is not done yet.

    In a sweep a failed run is reported and counts as NaN; the others go on.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        job.mark_unfinished(run_dir)
        outcome = run(config, run_dir, sweeping)
    except Exception as error:
        outcome = note_error(error, run_dir, sweeping)
        if not sweeping:
            raise
    job.exit_job(outcome.state)
    if outcome.state is State.INTERRUPTED and sweeping:
        raise KeyboardInterrupt  # whoever stops a run of a sweep does not ask for the next one
    return outcome.metrics.get("val/diffusion_loss") if outcome.state is State.FINISHED else math.nan


def note_error(error: Exception, run_dir: Path, sweeping: bool) -> Outcome:
    """Write down why the run failed and, in a sweep, tell; a process that lost the others leaves that to them."""
    lost = lost_process(error)
    torch = sys.modules.get("torch")
    together = torch is not None and torch.distributed.is_initialized()
    if not lost and (rank() == 0 or together):
        note_failure(error, run_dir, task_overrides(), sweeping, together)
    if sweeping:
        reason = "another process of the run is gone; its output says why" if lost else explain(error)
        show(f"{os.path.relpath(run_dir)}: {reason or describe_failure(error)}")
        if reason is None:
            traceback.print_exception(error)
    return Outcome(State.LOST if lost else State.FAILED)


if __name__ == "__main__":
    # by its name, under which the processes of a job find it
    from dcdit.train import main as command

    entry_point(command)
