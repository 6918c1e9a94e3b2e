"""A run from its configuration to its outcome, in phases."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from dcdit.data.datamodule import LatentDataModule
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.network.blocks import set_execution
from dcdit.runs.lock import sole_writer
from dcdit.runs.resume import check_same, find_checkpoint, is_finished, leave_queue, note, started
from dcdit.runs.state import Outcome, RunState, State
from dcdit.runtime.memory import keep_freed_memory
from dcdit.runtime.processes import rank, say
from dcdit.settings.entry import plain
from dcdit.training.batching import check_devices
from dcdit.training.build import build_data, build_module, build_trainer, check_network, match_compute
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.module import DCDiTModule
from dcdit.training.settings import GROUPS, TrainPlan


def train(config: DictConfig, run_dir: Path, patience: float = 0.0, inside_job: bool = False) -> Outcome:
    """Run a composed configuration in ``run_dir``.

    Args:
        config: the configuration.
        run_dir: of the run, which exists.
        patience: seconds to wait for another process that is about to let go of the run.
        inside_job: whether a cluster's job starts the run again if it is interrupted.

    Returns:
        Whether it finished or was interrupted, at which step, and its last metrics.

    Raises:
        UserError: naming key, value and remedy; everything that can be wrong is checked before the first step.
    """
    config.run_dir = str(run_dir)
    # 1. Check what was asked for, before any data are written.
    plan = match_compute(TrainPlan.of(plain(config, sections=GROUPS)))
    check_network(plan)
    with sole_writer(run_dir, rank(), patience):
        # 2. Look for an earlier part of the run.
        checkpoint, before = find_checkpoint(plan.run.ckpt_path, run_dir), RunState.read(run_dir)
        if checkpoint:
            check_same(plan.values, run_dir)
        if checkpoint and before and is_finished(before, plan.trainer.max_steps):
            leave_queue(None, run_dir)
            where = f"{os.path.relpath(run_dir)} is finished, at step {before.step}"
            say(f"{where}: train on with a larger trainer.max_steps")
            return Outcome(State.FINISHED, before.step, before.metrics)
        leave_queue(before, run_dir)
        check_devices(plan)
        restarts = plan.values["cluster"].get("max_restarts")
        state = started(before, run_dir, plan.trainer.max_steps, plan.run.run_id, restarts)
        config.run_id = state.id
        # 3. Open the data, and see that the network takes them.
        data, manifest = open_data(plan)
        # 4. Build what trains.
        keep_freed_memory()
        pl.seed_everything(plan.run.seed, workers=True, verbose=False)
        module = build_module(plan, manifest.spec)
        manifest.spec.check_network(module.network)
        module.network.to(memory_format=torch.channels_last)  # which convolutions prefer, on CPUs and tensor cores
        set_execution(module.network, plan.execution.compile, plan.execution.activation_checkpointing)
        interrupt = StopOnInterrupt()
        trainer = build_trainer(plan, config, interrupt)
        # 5. Write down what is trained.
        say(words(module, plan, trainer.world_size, state.began if checkpoint else 0))
        save_settings(plan, state, trainer, run_dir)
        note(state, run_dir)
        # 6. Train.
        try:
            trainer.fit(module, data, ckpt_path=checkpoint)
        finally:
            end_curves()
        # 7. Write down how it ended.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcome = Outcome(interrupt.outcome(trainer), trainer.global_step, metrics)
        state = replace(state, state=outcome.state, step=outcome.step, metrics=metrics, time=time.time())
        note(state, run_dir)
        say(next_words(outcome, run_dir, inside_job))
        trainer.strategy.barrier()  # a process that leaves a job early takes the others with it
        return outcome


def open_data(plan: TrainPlan) -> tuple[LatentDataModule, Manifest]:
    """The data, written if they write themselves, and their manifest; UserError if a batch exceeds them."""
    data = build_data(plan)
    data.prepare_data()
    manifest = data.manifest()
    if data.batch_size > manifest.samples:
        raise UserError(
            f"data.batch_size={data.batch_size} exceeds the {manifest.samples} samples in {data.location.place}: lower"
            " data.batch_size"
        )
    return data, manifest


def save_settings(plan: TrainPlan, state: RunState, trainer: pl.Trainer, run_dir: Path) -> None:
    """Write the resolved configuration beside the checkpoints, and hand it to the loggers."""
    settings: Mapping[str, Any] = {
        **{key: value for key, value in plan.values.items() if key != "cluster"},  # whose account paid is private
        "run_id": state.id,
        "trainer": {**plan.values["trainer"], **asdict(plan.trainer)},
    }
    if not rank():
        OmegaConf.save(OmegaConf.create(dict(settings)), run_dir / "config.yaml")
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(settings))


def end_curves() -> None:
    """The next run of a sweep, in the same process, would go on with this one's curves at wandb."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def words(module: DCDiTModule, plan: TrainPlan, world_size: int, began: int) -> str:
    """What is about to be trained, on how many processes, and from which step on."""
    parameters = sum(parameter.numel() for parameter in module.network.parameters())
    where = os.path.relpath(plan.values["run_dir"])
    return (
        f"Training {module.network.title} with {parameters / 1e6:.1f}M parameters for {plan.trainer.max_steps} steps of"
        f" {plan.batch_size} samples, {plan.trainer.accelerator} {plan.trainer.precision}"
        + (f" on {world_size} processes" if world_size > 1 else "")
        + f", in {where}"
        + (f", on from step {began}" if began else "")
    )


def next_words(outcome: Outcome, run_dir: Path, inside_job: bool) -> str:
    """How it ended, and what to do next."""
    last = Path(os.path.relpath(run_dir / "checkpoints" / "last.ckpt"))
    if outcome.state is State.INTERRUPTED:
        resume = "" if inside_job else " Resume: the same command with ckpt_path=last"
        return f"Stopped and saved at step {outcome.step}.{resume}"
    sample = f" Sample: python -m dcdit.sample checkpoint={last}" if last.exists() else ""
    return f"Finished at step {outcome.step}.{sample}"
