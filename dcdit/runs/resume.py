"""What a run finds in its directory when it is started: an earlier part of itself, or the note that it is queued."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from dcdit.checks import without_credentials
from dcdit.errors import UserError
from dcdit.runs.changes import Change
from dcdit.runs.state import QUEUED_NAME, RunState, State
from dcdit.runtime.processes import rank

LAST = "last.ckpt"
STEP_NAME = re.compile(r"step_(\d{8})\.ckpt")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint of an optimiser step."""
    return f"step_{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by optimiser step, newest first; without ``last.ckpt``, the newest of them."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    steps = {int(found[1]): path for path in files if (found := STEP_NAME.fullmatch(path.name))}
    return dict(sorted(steps.items(), reverse=True))


def find_checkpoints(ckpt_path: str | None, run_dir: Path) -> list[Path]:
    """The checkpoints to go on from, the first that is whole; none to start afresh.

    Raises:
        UserError: if ``ckpt_path`` names none that is there, or a fresh start would overwrite an earlier run.
    """
    folder = run_dir / "checkpoints"
    last = folder / LAST
    # A kill between the two leaves a newest checkpoint of which `last.ckpt` does not know yet.
    found = [*checkpoints_in(folder).values(), *([last] if last.exists() else [])]
    if ckpt_path is None:
        if found:
            raise UserError(
                f"run_dir={run_dir} already holds a run: resume it with ckpt_path=last, start another with"
                " run_name=... (or another run_dir, if you gave that), or delete the directory"
            )
        return []
    if ckpt_path in ("auto", "last"):
        if ckpt_path == "last" and not found:
            raise UserError(f"ckpt_path=last: there is no checkpoint {last}; leave ckpt_path out to start anew")
        return found
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: there is no such checkpoint; leave ckpt_path out to start anew")
    return [Path(ckpt_path)]


def is_finished(before: RunState | None, max_steps: int) -> bool:
    """Whether the run that left ``before`` did ``max_steps``."""
    return before is not None and before.state is State.FINISHED and before.step >= max_steps


def started(
    before: RunState | None,
    run_dir: Path,
    max_steps: int,
    *,
    run_id: str | None = None,
    max_restarts: int | None = None,
    batch_size: int = 0,
    settings: Mapping[str, Any] = MappingProxyType({}),
    found: tuple[Change, ...] = (),
) -> RunState:
    """The state of the run once it trains.

    Args:
        before: what the last start left.
        run_dir: of the run.
        max_steps: of the whole run.
        run_id: of its curves; None keeps the one it has, or makes one.
        max_restarts: restarts without another checkpoint in between after which a run is given up; None never does.
        batch_size: samples of an optimiser step.
        settings: what is trained with, see :func:`dcdit.runs.changes.recorded`.
        found: what of it changed.

    Raises:
        UserError: if it died too often without getting any further.
    """
    newest = next(iter(checkpoints_in(run_dir / "checkpoints")), 0)
    died_here = before is not None and before.state is State.RUNNING and before.began == newest
    starts = before.starts + 1 if before and died_here else 1
    if before is None:  # a job that SLURM queued again did start before, whatever became of the state
        queued_again = os.environ.get("SLURM_RESTART_COUNT", "")
        starts += int(queued_again) if queued_again.isdecimal() else 0
    # The first process alone decides: by now the others may read what it wrote about this very start.
    if max_restarts is not None and starts > max_restarts + 1 and not rank():
        raise UserError(
            f"cluster.max_restarts={max_restarts}: the run died {starts - 1} times in a row after step {newest},"
            " without another checkpoint in between. Look at job.log, save more often"
            " (callbacks.checkpoint.every_n_steps) if it had too little time, and submit it again"
        )
    state = RunState(
        State.RUNNING,
        0,
        max_steps,
        overrides=task_overrides(),
        began=newest,
        starts=starts,
        batch_size=batch_size,
        settings=settings,
        changes=(*(before.changes if before else ()), *found),
    )
    known = run_id or (before.id if before else None)
    return replace(state, id=known) if known else state


def task_overrides() -> tuple[str, ...]:
    """What was given on the command line, passwords left out; nothing where there is none."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return tuple(map(without_credentials, words))


def resuming_command(run_dir: Path, given: Sequence[str]) -> str | None:
    """The command line that goes on with a run as it was started last; None if that says no more than ``given``.

    Args:
        run_dir: of the run.
        given: the overrides of the present command, whose words of where the run lies are kept.
    """
    before = RunState.read(run_dir)
    where, others = _divided(given)
    then = _divided(before.overrides)[1] if before else []
    if not then or set(then) == set(others):
        return None
    return f"python -m dcdit.train {shlex.join([*then, *where, 'ckpt_path=last'])}"


def _divided(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides that say where a run lies, and all others but that it goes on."""
    where = [word for word in overrides if word.startswith(("run_name=", "run_dir=", "paths.runs="))]
    return where, [word for word in overrides if word not in where and not word.startswith("ckpt_path=")]


def note(state: RunState, run_dir: Path) -> None:
    """Write down what becomes of the run, once for all processes."""
    if not rank():
        state.write(run_dir)


def leave_queue(before: RunState | None, run_dir: Path) -> None:
    """The run's turn has come; an earlier failure is none any more. Done once for all processes."""
    if rank():
        return
    queued = run_dir / QUEUED_NAME
    if queued.exists():
        if before is not None and before.state is not State.RUNNING:
            note(replace(before, state=State.RUNNING, reason="", began=-1), run_dir)
        queued.unlink()
