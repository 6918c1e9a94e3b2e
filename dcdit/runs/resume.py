"""What a run finds in its directory when it is started: an earlier part of itself, or the note that it is queued."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dcdit.errors import UserError
from dcdit.runs.state import FINISHED, RUNNING, RunState
from dcdit.runs.state import QUEUED_NAME
from dcdit.runtime.processes import rank


def find_checkpoint(config: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoint to resume from: what ``ckpt_path`` says, or None to start afresh.

    Raises:
        UserError: if it does not exist, or a fresh start would overwrite an earlier run.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if config.ckpt_path is None:
        if last.exists():
            raise UserError(
                f"run_dir={run_dir} already holds a run: resume it with ckpt_path=last, start another with"
                " run_name=..., or delete the directory"
            )
        return None
    if config.ckpt_path == "auto":
        return last if last.exists() else None
    path = last if config.ckpt_path == "last" else Path(config.ckpt_path)
    if not path.is_file():
        raise UserError(
            f"ckpt_path={config.ckpt_path}: there is no checkpoint {path}; leave ckpt_path out to start anew"
        )
    return path


SAME = ("compression", "seed", "model", "ratio", "budget", "optimizer")
"""What makes an experiment, and must not change unseen when a run is resumed."""


def check_same(config: DictConfig, run_dir: Path) -> None:
    """Raise :class:`UserError` if the run in ``run_dir`` is of another experiment than ``config``.

    Only ``ckpt_path=auto`` asks: a sweep's directories are named by what varies in it, and the next one may vary
    something else. ``ckpt_path=last`` may well train on with other settings.
    """
    stored = run_dir / "config.yaml"
    if config.ckpt_path != "auto" or not stored.is_file():
        return
    then: Any = OmegaConf.to_container(OmegaConf.load(stored))
    now: Any = OmegaConf.to_container(config, resolve=True)
    old, new = (dict(_leaves({key: values.get(key) for key in SAME}, "")) for values in (then, now))
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


def is_finished(before: RunState | None, config: DictConfig) -> bool:
    """Whether the run that left ``before`` did all steps that ``config`` asks for."""
    return before is not None and before.state == FINISHED and before.step >= config.trainer.max_steps


def started(before: RunState | None, run_dir: Path, config: DictConfig) -> RunState:
    """The state of the run once it trains.

    Args:
        before: what the last start left.
        run_dir: of the run.
        config: of the run.

    Raises:
        UserError: if a job died too often without getting any further.
    """
    newest = max((int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step_*.ckpt")), default=0)
    died_here = before is not None and before.state == RUNNING and before.began == newest
    starts = before.starts + 1 if before and died_here else 1
    limit = config.cluster.get("attempts")
    # The first process alone decides: by now the others may read what it wrote about this very start.
    if limit is not None and starts > limit and not rank():
        raise UserError(
            f"cluster.attempts={limit}: the run died {limit} times in a row after step {newest}, without another"
            " checkpoint in between. Look at job.log, save more often (callbacks.checkpoint.every_n_steps) if it had"
            " too little time, and submit it again"
        )
    state = RunState(RUNNING, 0, config.trainer.max_steps, overrides=task_overrides(), began=newest, starts=starts)
    known = config.run_id or (before.id if before else None)
    return replace(state, id=known) if known else state


def task_overrides() -> tuple[str, ...]:
    """What was given on the command line; nothing where there is none."""
    return tuple(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()


@rank_zero_only
def note(state: RunState, run_dir: Path) -> None:
    """Write down what becomes of the run."""
    state.write(run_dir)


@rank_zero_only
def leave_queue(before: RunState | None, run_dir: Path) -> None:
    """The run's turn has come; an earlier failure is none any more."""
    queued = run_dir / QUEUED_NAME
    if queued.exists():
        if before is not None and before.state != RUNNING:
            note(replace(before, state=RUNNING, reason="", began=-1), run_dir)
        queued.unlink()
