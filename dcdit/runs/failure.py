"""Recording why a run failed, as one line in its directory."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dcdit.errors import UserError
from dcdit.runs.lock import LOCK, is_held
from dcdit.runs.progress import progress_of
from dcdit.runs.state import QUEUED_NAME, RunState, State
from dcdit.runtime.files import UnwritableError
from dcdit.settings.errors import explain


def describe_failure(error: BaseException) -> str:
    """A failure in one line: the first of the message that users see, else of the error, after its class."""
    message, name = explain(error), type(error).__name__
    lines = (str(error) if message is None else message).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0]}" if message is None else lines[0]


def note_failure(
    error: Exception, run_dir: Path, overrides: tuple[str, ...], sweeping: bool, together: bool = False
) -> None:
    """Record why a run failed; the directory of a refused command that is no part of a sweep is removed.

    Args:
        run_dir: of the run, no longer locked by this process.
        overrides: of the command line.
        sweeping: whether the run is part of a sweep, whose summary lists failed runs as well.
        together: whether this is one of several processes, another of which may still hold the directory.
    """
    try:
        before = RunState.read(run_dir)
    except UserError:
        return  # the corrupt file is the reason, and the user may want to repair it
    (run_dir / QUEUED_NAME).unlink(missing_ok=True)
    untouched = (State.FINISHED,) if sweeping else (State.FINISHED, State.INTERRUPTED)
    if (is_held(run_dir) and not together) or (before and before.state in untouched):
        return  # the state belongs to another process, or to an earlier run that this command has not touched
    if before or sweeping:
        state = before or RunState(State.FAILED, overrides=overrides)
        step = progress_of(run_dir, "").step
        failed = replace(state, state=State.FAILED, step=step, reason=describe_failure(error), time=time.time())
        with suppress(UnwritableError):  # a full disk may be the reason itself; the user is told it anyway
            failed.write(run_dir)
    elif {path.name for path in run_dir.iterdir()} <= {LOCK}:
        shutil.rmtree(run_dir)
