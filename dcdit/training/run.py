"""A run from its configuration to its outcome, in phases."""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from dcdit.checks import to_plain
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.network.blocks import set_execution
from dcdit.runs.changes import changes, describe_changes
from dcdit.runs.lock import sole_writer
from dcdit.runs.resume import LAST, find_checkpoints, is_finished, leave_queue, state_at_start, write_state
from dcdit.runs.state import Outcome, RunState, State
from dcdit.runtime.files import write_json, write_text
from dcdit.runtime.memory import keep_freed_memory
from dcdit.runtime.processes import rank, say
from dcdit.settings.compose import with_run_id
from dcdit.training.batching import check_devices, with_accelerator, world_size
from dcdit.training.build import build_data, build_module, build_trainer, check_network, match_compute
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.initial_weights import Start, start_from
from dcdit.training.loggers import keep_going
from dcdit.training.module import DCDiTModule
from dcdit.training.resume import Resumed, check_resumed, open_first_whole
from dcdit.training.settings import TrainConfig


def run_training(config: TrainConfig, patience: float = 0.0, inside_job: bool = False) -> Outcome:
    """Train in ``config.run_dir``, which is made if it is not there.

    Args:
        config: the configuration.
        patience: seconds to wait for another process that is about to let go of the run.
        inside_job: whether a cluster's job starts the run again if it is interrupted.

    Returns:
        Whether it finished or was interrupted, at which step, and its last metrics.

    Raises:
        UserError: naming key, value and remedy; everything that can be wrong is checked before the first step.
    """
    run_dir = Path(config.run_dir)
    # 1. Check what was asked for, before any data are written.
    config = match_compute(with_accelerator(config))
    check_network(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {**config.recorded, "processes": world_size(config)}
    with sole_writer(run_dir, rank(), patience):
        # 2. Look for an earlier part of the run. Nothing of it is written to before all is known to fit.
        before, paths = RunState.read(run_dir), find_checkpoints(config.ckpt_path, run_dir)
        by_itself = config.ckpt_path == "auto"
        anew = paths and config.ckpt_path not in ("auto", "last") and paths[0].name != LAST  # an earlier step, named
        if paths and before and is_finished(before, config.trainer.max_steps) and not anew:
            changes(before.settings, settings, before.step, by_itself)
            leave_queue(None, run_dir)
            where = f"{os.path.relpath(run_dir)} is finished, at step {before.step}"
            say(f"{where}: train on with a larger trainer.max_steps")
            return Outcome(State.FINISHED, before.step, before.metrics)
        if before and not paths and (config.callbacks or {}).get("checkpoint"):
            check_record(before, run_dir)
        check_devices(config)
        resumed = open_first_whole(paths)
        step = resumed.step if resumed else 0
        found = changes(resumed.settings, settings, step, by_itself) if resumed else ()
        state = state_at_start(
            before,
            run_dir,
            config.trainer.max_steps,
            run_id=config.run_id,
            max_restarts=config.cluster.get("max_restarts"),
            batch_size=config.batch_size,
            settings=settings,
            changed=found,
        )
        # 3. Open the data, and see that the network takes them.
        data, manifest = open_data(config)
        # 4. Build what trains.
        keep_freed_memory()
        pl.seed_everything(config.seed, workers=True, verbose=False)
        module = build_module(config, manifest.spec)
        module.settings = settings
        manifest.spec.check_network(module.network)
        module.network.to(memory_format=torch.channels_last)  # which convolutions prefer, on CPUs and tensor cores
        set_execution(module.network, config.execution.compile, config.execution.activation_checkpointing)
        begun = start_from(config.init, module.network, module.process, manifest.spec, config.paths.runs, step)
        begin(module, begun, resumed)
        interrupt = StopOnInterrupt()
        if resumed:
            check_resumed(resumed, module.network, module.process, manifest)
        trainer = build_trainer(config, interrupt, state.id, resumed.trained.values if resumed else None)
        path, resumed = resumed.path if resumed else None, None  # Lightning gives its memory back
        # 5. Write down what is trained.
        leave_queue(before, run_dir)
        if begun.checkpoint and not step:
            say(begun.describe())
            save_start(begun, run_dir)
        say(describe_training(module, config, trainer.world_size, step))
        if found:
            say(describe_changes(found))
        save_settings(config, state, trainer, run_dir)
        write_state(state, run_dir)
        # 6. Train.
        for logger in trainer.loggers:
            keep_going(logger)
        try:
            trainer.fit(module, data, ckpt_path=path)
        finally:
            end_curves()
        # 7. Write down how it ended.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcome = Outcome(interrupt.outcome(trainer), trainer.global_step, metrics)
        state = replace(state, state=outcome.state, step=outcome.step, metrics=metrics, time=time.time())
        write_state(state, run_dir)
        say(describe_outcome(outcome, run_dir, inside_job))
        trainer.strategy.barrier()  # a process that leaves a job early takes the others with it
        return outcome


def check_record(before: RunState, run_dir: Path) -> None:
    """Raise :class:`UserError` if an earlier part of the run was saved, and its checkpoints are gone."""
    if before.step and before.state in (State.FINISHED, State.INTERRUPTED):
        raise UserError(
            f"run_dir={run_dir}: {before.step} steps of this run were done and saved, but its checkpoints are gone."
            " Restore them, or delete the directory to start anew, or take another run_name"
        )


def begin(module: DCDiTModule, start: Start, resumed: Resumed | None) -> None:
    """Have the module say what it started from, and match the teacher; UserError if that was another one."""
    module.distillation = start.distillation
    before = resumed.trained.training.get("init") if resumed else None
    if before and start.record and before.get("fingerprint") != start.fingerprint:
        raise UserError(
            f"init: the run was started from {before.get('source')}, weights {before.get('fingerprint')}; now it is"
            f" {start.source}, weights {start.fingerprint}. Name the same, or start another run with run_name=..."
        )
    module.hparams["init"] = dict(before or start.record)


def save_start(start: Start, run_dir: Path) -> None:
    """Write down, name by name, what was taken over, what is new and what was left behind."""
    if not rank():
        names = {key: list(getattr(start, key)) for key in ("loaded", "new", "left", "frozen")}
        write_json(run_dir / "init.json", {**start.record, **names})


def open_data(config: TrainConfig) -> tuple[LatentDataModule, Manifest]:
    """The data, written if they write themselves, and their manifest; UserError if they cannot be trained on.

    Such as by batches that exceed them, or a validation split of other latents.
    """
    data = build_data(config)
    data.prepare_data()
    manifest = data.manifest()
    data.validation()
    if data.batch_size > manifest.samples:
        raise UserError(
            f"data.batch_size={data.batch_size} exceeds the {manifest.samples} samples in {data.location.root}: lower"
            " data.batch_size"
        )
    return data, manifest


def save_settings(config: TrainConfig, state: RunState, trainer: pl.Trainer, run_dir: Path) -> None:
    """Write the resolved configuration beside the checkpoints, and hand it to the loggers."""
    private = ("cluster",)  # whose account paid
    settings: Mapping[str, Any] = {
        **with_run_id({key: value for key, value in to_plain(config).items() if key not in private}, state.id),
        "run_id": state.id,
    }
    if not rank():
        write_text(run_dir / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(settings))


def end_curves() -> None:
    """The next run of a sweep, in the same process, would go on with this one's curves at wandb."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def describe_training(module: DCDiTModule, config: TrainConfig, world_size: int, began: int) -> str:
    """Describe what is trained, on how many processes, and from which step on."""
    parameters = sum(parameter.numel() for parameter in module.network.parameters())
    where = os.path.relpath(config.run_dir)
    return (
        f"Training {module.network.title} with {parameters / 1e6:.1f}M parameters for {config.trainer.max_steps} steps"
        f" of {config.batch_size} samples, {config.trainer.accelerator} {config.trainer.precision}"
        + (f" on {world_size} processes" if world_size > 1 else "")
        + f", in {where}"
        + (f", on from step {began}" if began else "")
    )


def describe_outcome(outcome: Outcome, run_dir: Path, inside_job: bool) -> str:
    """Describe how the run ended, and the command that comes next."""
    last = run_dir / "checkpoints" / LAST
    word = shlex.quote(f"checkpoint={os.path.relpath(run_dir)}")
    if outcome.state is State.INTERRUPTED:
        resume = "" if inside_job else " Resume: the same command with ckpt_path=last"
        return f"Stopped and saved at step {outcome.step}.{resume}"
    sample = f" Sample: python -m dcdit.sample {word}" if last.exists() else ""
    return f"Finished at step {outcome.step}.{sample}"
