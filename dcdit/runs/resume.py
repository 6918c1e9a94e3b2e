"""How a run starts in its directory: whether there is an earlier part of it, or the note that it is queued."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from hydra.core.hydra_config import HydraConfig

from dcdit.checks import without_credentials
from dcdit.errors import UserError
from dcdit.runs.changes import Change
from dcdit.runs.state import QUEUED_NAME, RunState, Started, State
from dcdit.runtime.processes import rank
from dcdit.settings.plugins import words_of_plugins

LAST = "last.ckpt"
STEP_NAME = re.compile(r"step_(\d{8})\.ckpt")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint of an optimiser step."""
    return f"step_{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by optimiser step, newest first; without ``last.ckpt``, the newest of them."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    steps = {int(match[1]): path for path in files if (match := STEP_NAME.fullmatch(path.name))}
    return dict(sorted(steps.items(), reverse=True))


def find_checkpoints(ckpt_path: str | None, run_dir: Path) -> list[Path]:
    """The checkpoints that a run may go on from, best first; none if it starts afresh.

    Raises:
        UserError: if ``ckpt_path`` names no checkpoint that is there, or a fresh start would overwrite an earlier run.
    """
    folder = run_dir / "checkpoints"
    last = folder / LAST
    # A kill between the two leaves a newest checkpoint of which `last.ckpt` does not know yet.
    checkpoints = [*checkpoints_in(folder).values(), *([last] if last.exists() else [])]
    if ckpt_path is None:
        if checkpoints:
            raise UserError(
                f"run_dir={run_dir} already holds a run: go on with it by resume={os.path.relpath(run_dir)}, or by this"
                " command with ckpt_path=last; start another with run_name=... (or another run_dir, if you gave that);"
                " or delete the directory"
            )
        return []
    if ckpt_path in ("auto", "last"):
        if ckpt_path == "last" and not checkpoints:
            raise UserError(f"ckpt_path=last: there is no checkpoint {last}; to start anew, leave ckpt_path out")
        return checkpoints
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: there is no such checkpoint; leave ckpt_path out to start anew")
    return [Path(ckpt_path)]


def is_finished(before: RunState | None, max_steps: int) -> bool:
    """Whether a run whose directory holds the state ``before`` has finished ``max_steps``."""
    return before is not None and before.state is State.FINISHED and before.step >= max_steps


def state_at_start(
    before: RunState | None,
    run_dir: Path,
    max_steps: int,
    *,
    step: int = 0,
    run_id: str | None = None,
    max_restarts: int | None = None,
    batch_size: int = 0,
    settings: Mapping[str, object] = MappingProxyType({}),
    changed: tuple[Change, ...] = (),
) -> RunState:
    """The state of a run that begins to train.

    Args:
        before: the state that the last start left.
        max_steps: of the whole run.
        step: that it goes on from.
        run_id: of its curves; None keeps the one it has, or makes one.
        max_restarts: restarts without another checkpoint in between after which a run is given up; None never does.
        settings: what is trained with, see :func:`dcdit.runs.changes.values_to_record`.
        changed: since the run was last started.

    Raises:
        UserError: if it died too often without getting any further.
    """
    newest = next(iter(checkpoints_in(run_dir / "checkpoints")), 0)
    died_here = before is not None and before.state is State.RUNNING and before.began == newest
    starts = before.starts + 1 if before and died_here else 1
    if before is None:  # a job that SLURM queued again did start before, whatever became of the state
        queued_again = os.environ.get("SLURM_RESTART_COUNT", "")
        starts += int(queued_again) if queued_again.isdecimal() else 0
    # Only the first process decides: the others may already read the state that it wrote for this start.
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
        overrides=overrides_of_run(before),
        commands=commands_of_run(before, step),
        began=newest,
        starts=starts,
        batch_size=batch_size,
        settings=settings,
        changes=(*(before.changes if before else ()), *changed),
    )
    kept_id = run_id or (before.id if before else None)
    return replace(state, id=kept_id) if kept_id else state


def task_overrides() -> tuple[str, ...]:
    """The overrides of the command line, without passwords; none outside of a command."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return tuple(map(without_credentials, overrides))


def overrides_of_run(before: RunState | None) -> tuple[str, ...]:
    """The overrides that describe a run: those of the command line, after ``resume=`` on top of those that it had."""
    given = task_overrides()
    if not any(override.startswith("resume=") for override in given):
        return given
    given = tuple(override for override in given if not override.startswith("resume="))
    replaced = {_key_of(override) for override in given}
    return (
        *(override for override in (before.overrides if before else ()) if _key_of(override) not in replaced),
        *given,
    )


def commands_of_run(before: RunState | None, step: int) -> tuple[Started, ...]:
    """The command lines of a run that goes on from ``step`` by the one that is run; one that changes none adds none."""
    known = before.commands or (Started(0, before.overrides),) if before else ()  # older states have no commands
    earlier = tuple(start for start in known if start.step < step)
    given = task_overrides()
    return earlier if earlier and earlier[-1].overrides == given else (*earlier, Started(step, given))


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def resuming_command(run_dir: Path) -> str:
    """The command that goes on with a run as it was last started."""
    return f"python -m dcdit.train{words_of_plugins()} {shlex.quote(f'resume={os.path.relpath(run_dir)}')}"


def name_in_results(run_dir: Path) -> str:
    """The name of a run in results and reports: that of its directory, after the name of the sweep it is part of."""
    folder = run_dir.resolve()
    sweep = folder.parent.name
    return f"{sweep.removesuffix('_sweep')}/{folder.name}" if sweep.endswith("_sweep") else folder.name


def write_state(state: RunState, run_dir: Path) -> None:
    """Write the state of a run, once for all processes."""
    if not rank():
        state.write(run_dir)


def leave_queue(run_dir: Path) -> None:
    """Remove the note that the run is queued, once for all processes."""
    if not rank():
        (run_dir / QUEUED_NAME).unlink(missing_ok=True)
