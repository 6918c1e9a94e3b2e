"""Why a run failed, in one line of its directory."""

import csv
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from dcdit.errors import UserError
from dcdit.runtime.jobs import write_json
from dcdit.runs.state import FAILED
from dcdit.runs.state import FINISHED
from dcdit.runs.state import INTERRUPTED
from dcdit.runs.lock import LOCK
from dcdit.runs.state import QUEUED_NAME
from dcdit.runs.state import RunState
from dcdit.runs.lock import is_held
from dcdit.runs.progress import progress_of


def one_line(error: BaseException) -> str:
    """A failure in one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def note_failure(
    error: Exception, run_dir: Path, overrides: tuple[str, ...], sweeping: bool, together: bool = False
) -> None:
    """Write down why the run failed; a refused command that is no part of a sweep leaves nothing behind.

    Args:
        error: the reason.
        run_dir: of the run, no longer held by this process.
        overrides: what was given on the command line.
        sweeping: whether the run is part of a sweep, whose summary shall have it.
        together: whether this is one of several processes, another of which may still hold the directory for all.
    """
    before = RunState.read(run_dir)
    (run_dir / QUEUED_NAME).unlink(missing_ok=True)
    untouched = (FINISHED,) if sweeping else (FINISHED, INTERRUPTED)
    if (is_held(run_dir) and not together) or (before and before.state in untouched):
        return  # another's, or an earlier one that this command has not touched
    if before or sweeping:
        state = before or RunState(FAILED, overrides=overrides)
        step = progress_of(run_dir, "").step
        replace(state, state=FAILED, step=step, reason=one_line(error), time=time.time()).write(run_dir)
    elif {path.name for path in run_dir.iterdir()} <= {".hydra", LOCK}:
        shutil.rmtree(run_dir)
