"""What became of a run, kept in its directory: for whoever resumes it, sums up a sweep, or asks how far it is."""

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
from dcdit.ledger import write_json

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
QUEUED = "queued"
"""Said by a file of its own, so that neither a job nor whoever queues it writes over what the other says."""
_NAME, LOCK, QUEUED_NAME = "state.json", ".running.lock", ".queued"


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


@contextmanager
def sole_writer(run_dir: Path, rank: int, patience: float = 0) -> Iterator[None]:
    """Hold a run's directory; the kernel gives it back however the process ends.

    Args:
        run_dir: the directory.
        rank: of this process; the first holds it for all.
        patience: seconds to wait for one that is about to end.

    Raises:
        UserError: if another run does.
    """
    if rank:
        yield
        return
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        holder = RunState.read(run_dir)
        where = f" on {holder.host}" if holder and holder.host != socket.gethostname() else ""
        raise UserError(
            f"run_dir={os.path.relpath(run_dir)}: another process{where} is training there; wait for it, or start this"
            " one with another run_name=..."
        ) from None
    except NotImplementedError:
        pass  # a file system without locks, where nobody can tell; to release below does nothing then
    try:
        yield
    finally:
        lock.release()


def is_held(run_dir: Path) -> bool:
    """Whether a process trains in ``run_dir`` right now."""
    path = run_dir / LOCK
    if not path.is_file():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True
    except NotImplementedError:
        return False


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
