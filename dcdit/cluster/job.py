"""Inside a job: what leads to its being queued again, and what does not.

A file beside the job's script says that its run is neither finished nor failed for reasons of its own. The script
queues the job again as long as it is there (:func:`dcdit.cluster.settings.again`): who is killed need not say anything.
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

MARK = ".unfinished"
QUEUED_AGAIN, FAILED_FOR_GOOD = 75, 1
"""Exit statuses of a job's processes: the first is EX_TEMPFAIL of sysexits.h."""

_inside = False


def enter() -> None:
    """Say that this process belongs to a job, and take its signals over from submitit, which would queue it again."""
    global _inside
    _inside = True
    set_up_process()
    logging.getLogger("submitit").propagate = False  # it prints by itself
    # Until training takes them over there is nothing to save.
    for each in set(STOP_SIGNALS) - {signal.SIGINT}:
        signal.signal(each, _leave)


def _leave(signum: int, frame: FrameType | None) -> None:
    print(f"{signal.Signals(signum).name} outside of training: leaving", flush=True)
    sys.exit(QUEUED_AGAIN)


def inside() -> bool:
    """Whether this process belongs to a job."""
    return _inside


def begin(run_dir: Path) -> None:
    """Mark the run as unfinished, and lay a link to the job's output beside it."""
    if not _inside or processes()[0]:
        return
    import submitit

    paths = submitit.JobEnvironment().paths
    _mark().write_text(str(run_dir.resolve()))
    link = run_dir / "job.log"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(paths.stdout, run_dir.resolve()))


def end(state: State) -> None:
    """Leave the job as its run ended; returns if it finished, or if there is no job."""
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
