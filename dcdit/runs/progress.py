"""How far a run is, from its directory alone."""

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
from dcdit.runs.state import QUEUED
from dcdit.runs.state import QUEUED_NAME
from dcdit.runs.state import RUNNING
from dcdit.runs.state import RunState
from dcdit.runs.state import _NAME
from dcdit.runs.lock import is_held


@dataclass(frozen=True)
class Progress:
    """How far a run is, from its directory alone.

    Attributes:
        name: of the run, below the folder that was asked about.
        state: as of :class:`RunState`; ``queued`` if a job waits for its turn, ``died`` if it says running and no
            process is, ``waiting`` if it has not begun.
        step, max_steps: optimiser steps.
        loss: the last logged diffusion loss of training.
        rate: images per second, the last logged.
        seconds_left: at that rate; None if nothing tells.
        reason: of a failure.
        metrics: the last value of each validation metric; at the end of a run, of every metric.
    """

    name: str
    state: str
    step: int
    max_steps: int
    loss: float | None
    rate: float | None
    seconds_left: float | None
    reason: str
    metrics: Mapping[str, float]


def progress_of(run_dir: Path, name: str) -> Progress:
    """Look at a run."""
    known = RunState.read(run_dir)
    last = _last_logged(run_dir)
    state = known.state if known else "waiting"
    held = is_held(run_dir)
    if not held and (run_dir / QUEUED_NAME).exists():
        state = QUEUED
    elif state == RUNNING and not held:
        state = "died"
    step = max(known.step if known else 0, int(last.get("step", -1)) + 1)
    if known and known.state != RUNNING:
        step = known.step
    max_steps = known.max_steps if known else 0
    rate, batch = last.get("train/images_per_s"), _batch_size(run_dir)
    left = (max_steps - step) * batch / rate if rate and batch and state == RUNNING else None
    metrics = {key: value for key, value in last.items() if key.startswith("val/")}
    return Progress(
        name,
        state,
        step,
        max_steps,
        last.get("train/diffusion_loss"),
        rate,
        left,
        known.reason if known else "",
        {**metrics, **(known.metrics if known else {})},
    )


def _batch_size(run_dir: Path) -> int | None:
    try:
        return int(OmegaConf.load(run_dir / "config.yaml").data.batch_size)
    except (OSError, AttributeError, TypeError, ValueError):
        return None


def _last_logged(run_dir: Path) -> dict[str, float]:
    """The last value of every column of the run's CSV logs, later files winning; empty without any."""
    found: dict[str, float] = {}
    files = sorted(run_dir.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    try:
                        found[key] = float(value)
                    except (TypeError, ValueError):
                        continue
    return found


def runs_below(folder: Path) -> list[Path]:
    """Directories of runs in and below ``folder``, by name."""
    marks = {path.parent for name in (_NAME, "config.yaml", QUEUED_NAME) for path in folder.rglob(name)}
    return sorted(path for path in marks if path.name != ".hydra")
