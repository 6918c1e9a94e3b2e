"""What a run finds in its directory when it is started: an earlier part of itself, or the note that it is queued."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dcdit.errors import UserError
from dcdit.runs.state import QUEUED_NAME, RunState, State
from dcdit.runtime.processes import rank


def find_checkpoint(ckpt_path: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to resume from: what ``ckpt_path`` says, or None to start afresh.

    Raises:
        UserError: if it does not exist, or a fresh start would overwrite an earlier run.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if ckpt_path is None:
        if last.exists():
            raise UserError(
                f"run_dir={run_dir} already holds a run: resume it with ckpt_path=last, start another with"
                " run_name=... (or another run_dir, if you gave that), or delete the directory"
            )
        return None
    if ckpt_path == "auto":
        return last if last.exists() else None
    path = last if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"ckpt_path={ckpt_path}: there is no checkpoint {path}; leave ckpt_path out to start anew")
    return path


SAME = ("compression", "seed", "model", "ratio", "multi_budget", "optimizer")
"""What makes an experiment, and must not change unseen when a run is resumed."""


def check_same(values: Mapping[str, Any], run_dir: Path) -> None:
    """Raise :class:`UserError` if the run in ``run_dir`` is of another experiment than the plain ``values`` describe.

    Only ``ckpt_path=auto`` asks: a sweep's directories are named by what varies in it, and the next one may vary
    something else. ``ckpt_path=last`` may well train on with other settings.
    """
    stored = run_dir / "config.yaml"
    if values["ckpt_path"] != "auto" or not stored.is_file():
        return
    then: Any = OmegaConf.to_container(OmegaConf.load(stored))
    old, new = (dict(_leaves({key: each.get(key) for key in SAME}, "")) for each in (then, values))
    for key in {**new, **old}:
        if old.get(key) != new.get(key):
            where = os.path.relpath(run_dir)
            raise UserError(
                f"{key}={new.get(key)}: the run in {where} was trained with {old.get(key)}, and ckpt_path=auto does"
                " not go on with another experiment. Take another run_name, or, to train on with the new value,"
                " ckpt_path=last"
            )


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The single values in nested mappings, by their paths."""
    if not isinstance(node, dict):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def is_finished(before: RunState | None, max_steps: int) -> bool:
    """Whether the run that left ``before`` did ``max_steps``."""
    return before is not None and before.state is State.FINISHED and before.step >= max_steps


def started(
    before: RunState | None, run_dir: Path, max_steps: int, run_id: str | None = None, max_restarts: int | None = None
) -> RunState:
    """The state of the run once it trains.

    Args:
        before: what the last start left.
        run_dir: of the run.
        max_steps: of the whole run.
        run_id: of its curves; None keeps the one it has, or makes one.
        max_restarts: restarts without another checkpoint in between after which a run is given up; None never does.

    Raises:
        UserError: if it died too often without getting any further.
    """
    newest = max((int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step_*.ckpt")), default=0)
    died_here = before is not None and before.state is State.RUNNING and before.began == newest
    starts = before.starts + 1 if before and died_here else 1
    # The first process alone decides: by now the others may read what it wrote about this very start.
    if max_restarts is not None and starts > max_restarts + 1 and not rank():
        raise UserError(
            f"cluster.max_restarts={max_restarts}: the run died {starts - 1} times in a row after step {newest},"
            " without another checkpoint in between. Look at job.log, save more often"
            " (callbacks.checkpoint.every_n_steps) if it had too little time, and submit it again"
        )
    state = RunState(State.RUNNING, 0, max_steps, overrides=task_overrides(), began=newest, starts=starts)
    known = run_id or (before.id if before else None)
    return replace(state, id=known) if known else state


def task_overrides() -> tuple[str, ...]:
    """What was given on the command line; nothing where there is none."""
    return tuple(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()


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
