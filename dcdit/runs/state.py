"""The state of a run, kept in its directory: for a resume, for the summary of a sweep, and for ``dcdit status``."""

import math
import secrets
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from dcdit.checks import Count, Matches, Natural, Number, call_checked, conform
from dcdit.errors import UserError
from dcdit.runs.changes import Change
from dcdit.runtime.files import read_json, write_json

STATE_NAME, QUEUED_NAME = "state.json", ".queued"
"""The second file says that a job waits for its turn. It is a file of its own, so that a job and the process that
queues it do not overwrite each other's."""


class State(str, Enum):
    """What a run is doing, or how it ended: finished, interrupted, failed or lost."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    CORRUPT = "corrupt"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    LOST = "lost"

    @property
    def goes_on(self) -> bool:
        """Whether the run has to be started again: a signal ended it and it was saved, or one of its processes died."""
        return self in (State.INTERRUPTED, State.LOST)


@dataclass(frozen=True)
class Outcome:
    """How training ended, after how many optimiser steps, and the last value of each metric."""

    state: State
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


RunId = Annotated[str, Matches("[A-Za-z0-9_-]{1,64}", "a name of up to 64 letters, digits and _ -")]


@dataclass(frozen=True)
class Started:
    """A start of a run.

    Attributes:
        step: that it went on from; 0 at first.
        overrides: of its command line.
    """

    step: Natural
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class RunState:
    """The content of ``state.json``.

    Attributes:
        state: running, finished, interrupted (resume goes on) or failed.
        step, max_steps: optimiser steps done, and of the whole run.
        reason: of a failure, one line.
        metrics: the last value of each metric.
        host, time: of the machine that wrote this; seconds since the epoch.
        overrides: of the command line.
        commands: the first start, and those with other command lines that went on from it.
        id: of the run, for services that draw its curves; the same after every resume.
        began: step of the newest checkpoint when the run was started last.
        starts: how often in a row it was started there.
        batch_size: samples of an optimiser step.
        settings: what :func:`dcdit.runs.changes.values_to_record` says of the configuration.
        changes: the values that changed when the run went on, and from which step on.
    """

    state: State
    step: Natural = 0
    max_steps: Natural = 0
    reason: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)  # numbers, NaN among them
    host: str = field(default_factory=socket.gethostname)
    time: Number = field(default_factory=time.time)
    overrides: tuple[str, ...] = ()
    commands: tuple[Started, ...] = ()
    id: RunId = field(default_factory=lambda: secrets.token_hex(4))
    began: Natural = 0
    starts: Count = 1
    batch_size: Natural = 0
    settings: Mapping[str, object] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    def write(self, run_dir: Path) -> None:
        """Write the state to ``run_dir``, in place of the one that is there."""
        values = asdict(self)
        values["state"] = self.state.value
        values["metrics"] = {key: value if math.isfinite(value) else None for key, value in self.metrics.items()}
        write_json(run_dir / STATE_NAME, values)

    @classmethod
    def read(cls, run_dir: Path) -> "RunState | None":
        """The state that ``run_dir`` holds; None if there was no run.

        Raises:
            UserError: if the file is corrupt: it holds the run's id and how often it was started in vain.
        """
        path = run_dir / STATE_NAME
        remedy = "restore it, or delete it, which gives the run a new id and leaves its checkpoints as they are"
        try:
            values = read_json(path, dict[str, Any], remedy)
        except FileNotFoundError:
            return None
        try:
            numbers = conform("metrics", values.get("metrics"), dict[str, float | None])
            metrics = {key: math.nan if value is None else value for key, value in numbers.items()}
            return call_checked(cls, {**values, "state": State(values.get("state")), "metrics": metrics}, "")
        except ValueError as error:
            raise UserError(f"{path} is corrupt ({error}): {remedy}") from error


def command_of(run_dir: Path) -> str:
    """The commands that trained a run, for a shell, one a line; ``???`` for each path; empty if they are not known.

    The first began it. The others went on with it, and changed something.
    """
    try:
        state = RunState.read(run_dir)
    except UserError:
        return ""
    if state is None:
        return ""
    names, going_on = ("run_name=", "run_dir="), ("resume=", "ckpt_path=")
    lines: list[str] = []
    before: list[str] = []
    for start in state.commands or (Started(0, state.overrides),):
        recipe = [word for word in start.overrides if not word.startswith((*names, *going_on, "plugins="))]
        if not recipe or recipe == before:
            continue
        left_out = names if start.step else (*names, *going_on)
        words = [_without_path(word) for word in start.overrides if not word.startswith(left_out)]
        lines.append(shlex.join(["dcdit", "train", *words]) + (f"  # on from step {start.step}" if start.step else ""))
        before = recipe
    return "\n".join(lines)


def _without_path(override: str) -> str:
    """The override, with ``???`` for a value that is a path of this machine; repositories of the hub are no paths."""
    key, equals, value = override.partition("=")
    is_path = key == "resume" or ("/" in value and not value.strip("'\"").startswith("hf://"))
    return f"{key}{equals}???" if is_path else override
