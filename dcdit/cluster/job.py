"""Inside a job of SLURM: whether the job is queued again when it ends.

A file beside the job's script marks its run as unfinished: it has neither finished nor failed for reasons of its own.
The script queues the job again as long as that file is there (:func:`dcdit.cluster.settings.requeue_lines`), so a
process that is killed need not do anything.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from dcdit.runs.state import State
from dcdit.runtime.processes import processes
from dcdit.runtime.signals import STOP_SIGNALS
from dcdit.settings.command import set_up_process
from dcdit.settings.plugins import load_plugins

MARK = ".unfinished"
QUEUED_AGAIN, FAILED_FOR_GOOD = 75, 1
"""Exit statuses of a job's processes: the first is EX_TEMPFAIL of sysexits.h."""

_inside = False


def enter_job() -> None:
    """Note that this process belongs to a job, and handle signals instead of submitit, which would queue it again."""
    global _inside
    _inside = True
    set_up_process()
    load_plugins()
    logging.getLogger("submitit").propagate = False  # it prints by itself
    # Until training takes them over there is nothing to save.
    for signum in set(STOP_SIGNALS) - {signal.SIGINT}:
        signal.signal(signum, _exit_on_signal)


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    print(f"{signal.Signals(signum).name} outside of training: leaving", flush=True)
    sys.exit(QUEUED_AGAIN)


def is_inside_job() -> bool:
    """Whether this process belongs to a job."""
    return _inside


def mark_unfinished(run_dir: Path) -> None:
    """Mark the run of a job as unfinished, and link the job's output in the run's directory; nothing without a job."""
    if not _inside or processes()[0]:
        return
    import submitit

    paths = submitit.JobEnvironment().paths
    _mark().write_text(str(run_dir.resolve()))
    link = run_dir / "job.log"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(paths.stdout, run_dir.resolve()))


def exit_job(state: State) -> None:
    """Exit with the status for a run that ended in ``state``; returns if it finished, or if there is no job."""
    if not _inside:
        return
    sys.stdout.flush()
    if state.goes_on:
        sys.exit(QUEUED_AGAIN)
    _mark().unlink(missing_ok=True)
    if state is State.FAILED:
        sys.exit(FAILED_FOR_GOOD)


def _mark() -> Path:
    import submitit

    return submitit.JobEnvironment().paths.folder / f"{os.environ['SLURM_JOB_ID']}{MARK}"
