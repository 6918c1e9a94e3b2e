"""Train or resume: ``python -m dcdit.train experiment=digits``.

A run lives in ``runs/<run_name>``; ``resume=runs/<run_name>`` goes on with it after a crash, a kill or Ctrl-C. With
``-m`` and several values of a key the command runs a sweep, here or on a cluster.
"""

import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dcdit.cluster import job
from dcdit.errors import UserError
from dcdit.runs.failure import describe_failure, note_failure
from dcdit.runs.resume import resuming_command, task_overrides
from dcdit.runs.saved import CONFIG_NAME, values_to_resume
from dcdit.runs.state import Outcome, State
from dcdit.runtime.processes import lost_process, rank, say
from dcdit.settings.command import command
from dcdit.settings.errors import explain, print_error
from dcdit.training.settings import TrainConfig

PATIENCE = 180.0
"""Seconds that a job waits for the one before it to let go of the run: a node that died holds locks for a while."""


def note_ending(run: Callable[[], Outcome]) -> float | None:
    """Call ``run`` in a job of Hydra, and write down how the run ended where that is not done yet.

    In a sweep a failed run is reported and counts as NaN; the others go on.

    Returns:
        The validation loss, for sweepers that optimise it.
    """
    run_dir, sweeping = Path(HydraConfig.get().runtime.output_dir), is_sweep()
    try:
        job.mark_unfinished(run_dir)
        outcome = run()
    except Exception as error:
        outcome = note_error(error, run_dir, sweeping)
        if not sweeping:
            raise
    job.exit_job(outcome.state)
    if outcome.state is State.INTERRUPTED and sweeping:
        raise KeyboardInterrupt  # whoever stops a run of a sweep does not ask for the next one
    return outcome.metrics.get("val/diffusion_loss") if outcome.state is State.FINISHED else math.nan


@command("train", around=note_ending, saved=values_to_resume)
def train(config: TrainConfig) -> Outcome:
    """Train what ``config`` asks for in ``config.run_dir``; returns how it ended."""
    from dcdit.training.batching import check_local_sweep
    from dcdit.training.run import run_training

    sweeping = is_sweep()
    if sweeping and not job.is_inside_job():
        check_local_sweep(config)
    try:
        return run_training(config, PATIENCE if job.is_inside_job() else 0.0, job.is_inside_job())
    except UserError:
        run_dir = Path(config.run_dir)
        if not sweeping and config.resume is None and config.ckpt_path == "last" and (run_dir / CONFIG_NAME).exists():
            # apart from the message, whose frame would break it into lines
            say(f"To go on with the settings of {os.path.relpath(run_dir)}:\n{resuming_command(run_dir)}")
        raise


def is_sweep() -> bool:
    """Whether this is one of several runs of a command line."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def note_error(error: Exception, run_dir: Path, sweeping: bool) -> Outcome:
    """Write down why the run failed and, in a sweep, tell; a process that lost the others leaves that to them."""
    lost = lost_process(error)
    torch = sys.modules.get("torch")
    together = torch is not None and torch.distributed.is_initialized()
    if not lost and (rank() == 0 or together):
        note_failure(error, run_dir, task_overrides(), sweeping, together)
    if sweeping:
        reason = "another process of the run is gone; its output says why" if lost else explain(error)
        print_error(f"{os.path.relpath(run_dir)}: {reason or describe_failure(error)}")
        if reason is None:
            traceback.print_exception(error)
    return Outcome(State.LOST if lost else State.FAILED)


if __name__ == "__main__":
    # by its name, under which the processes of a job find it
    from dcdit.train import train as named

    named.main()
