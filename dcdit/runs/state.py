"""What a run says of itself, kept in its directory for whoever resumes it, sums up a sweep, or asks how far it is."""

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

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
QUEUED = "queued"
"""Said by a file of its own, so that neither a job nor whoever queues it writes over what the other says."""
_NAME, QUEUED_NAME = "state.json", ".queued"


@dataclass(frozen=True)
class RunState:
    """The content of ``state.json``.

    Attributes:
        state: ``running``, ``finished``, ``interrupted`` (resume goes on) or ``failed``.
        step, max_steps: optimiser steps done, and of the whole run.
        reason: of a failure, one line.
        metrics: the last value of each.
        host: machine that wrote this.
        time: seconds since the epoch.
        overrides: what was given on the command line.
        id: of the run, for services that draw its curves; the same after every resume.
        began: step of the newest checkpoint when the run was started last.
        starts: how often in a row it was started there.
    """

    state: str
    step: int = 0
    max_steps: int = 0
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)
    overrides: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    began: int = 0
    starts: int = 1

    def write(self, run_dir: Path) -> None:
        """Replace what ``run_dir`` says."""
        values = asdict(self)
        values["metrics"] = {key: value if math.isfinite(value) else None for key, value in self.metrics.items()}
        write_json(run_dir / _NAME, values)

    @classmethod
    def read(cls, run_dir: Path) -> "RunState | None":
        """What ``run_dir`` says; None if it says nothing that can be read."""
        try:
            values = json.loads((run_dir / _NAME).read_text())
            values["overrides"] = tuple(values["overrides"])
            values["metrics"] = {key: math.nan if value is None else value for key, value in values["metrics"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError):
            return None
