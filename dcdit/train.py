"""Train or resume: ``python -m dcdit.train experiment=digits``."""

import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dcdit.cluster import job
from dcdit.errors import UserError
from dcdit.network.blocks import execute
from dcdit.runs.failure import note_failure, one_line
from dcdit.runs.lock import sole_writer
from dcdit.runs.resume import check_same, find_checkpoint, is_finished, leave_queue, note, started, task_overrides
from dcdit.runs.state import FINISHED, INTERRUPTED, RunState
from dcdit.runtime.memory import keep_freed_memory
from dcdit.runtime.processes import lost_process, processes, rank
from dcdit.settings.entry import CONFIG_DIR, entry_point, explain, show
from dcdit.training.build import (
    build_data,
    build_module,
    build_trainer,
    check_devices,
    check_fit,
    match_compute,
    world_size,
)
from dcdit.training.callbacks import StopOnInterrupt
from dcdit.training.module import DCDiTModule

PATIENCE = 180.0
"""Seconds that a job waits for the one before it to let go of the run: a node that died holds locks for a while."""


@rank_zero_only
def save_config(settings: Mapping[str, Any], run_dir: Path) -> None:
    """Write the resolved configuration beside the checkpoints."""
    OmegaConf.save(OmegaConf.create(dict(settings)), run_dir / "config.yaml")


def train(config: DictConfig, run_dir: Path) -> dict[str, float]:
    """Run a composed configuration in ``run_dir`` and return its last metrics.

    Everything that can be wrong with the configuration is checked before the first step.

    Raises:
        UserError: naming key, value and remedy.
    """
    config.run_dir = str(run_dir)
    match_compute(config)
    with torch.device("meta"):
        build_module(config, latents={})  # cheap at any scale, before any data are written
    with sole_writer(run_dir, rank(), patience=PATIENCE if job.inside() else 0):
        checkpoint = find_checkpoint(config, run_dir)
        before = RunState.read(run_dir)
        if checkpoint:
            check_same(config, run_dir)
        if checkpoint and before and is_finished(before, config):
            leave_queue(None, run_dir)
            rank_zero_info(
                f"{os.path.relpath(run_dir)} is finished, at step {before.step}: train on with a larger"
                " trainer.max_steps"
            )
            return dict(before.metrics)
        leave_queue(before, run_dir)
        check_devices(config)
        state = started(before, run_dir, config)
        return fit(config, run_dir, checkpoint, state)


def fit(config: DictConfig, run_dir: Path, checkpoint: Path | None, state: RunState) -> dict[str, float]:
    """Train in ``run_dir``, which this process holds, from ``checkpoint`` on; returns the last metrics."""
    config.run_id = state.id
    data = build_data(config)
    data.prepare_data()
    manifest = data.manifest()
    if data.batch_size > manifest.samples:
        raise UserError(
            f"data.batch_size={data.batch_size} exceeds the {manifest.samples} samples in {config.data.directory}:"
            " lower data.batch_size"
        )
    check_fit(manifest, OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]

    keep_freed_memory()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = build_module(config, latents=manifest.summary())
    module.network.to(memory_format=torch.channels_last)  # which convolutions prefer, on processors and tensor cores
    for name in ("compile", "recompute_activations"):
        if not isinstance(config.trainer[name], bool):
            raise UserError(f"trainer.{name}={config.trainer[name]} is neither true nor false")
    execute(module.network, config.trainer.compile, config.trainer.recompute_activations)
    trainer = build_trainer(config)
    report_start(module, config, state.began if checkpoint else 0)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    del settings["cluster"]  # whose account paid is nobody else's business
    save_config(settings, run_dir)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    note(state, run_dir)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    finally:
        end_curves()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ended = INTERRUPTED if was_interrupted(trainer) else FINISHED
    note(replace(state, state=ended, step=trainer.global_step, metrics=metrics, time=time.time()), run_dir)
    report_end(trainer, run_dir)
    trainer.strategy.barrier()  # a process that leaves a job early takes the others with it
    return metrics


def end_curves() -> None:
    """The next run of a sweep, in the same process, would go on with this one's curves at wandb."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def was_interrupted(trainer: pl.Trainer) -> bool:
    """Whether a signal ended the training; one that came in the last step did not."""
    callbacks: Sequence[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    signalled = any(isinstance(callback, StopOnInterrupt) and callback.interrupted for callback in callbacks)
    return signalled and trainer.global_step < trainer.max_steps


def report_start(module: DCDiTModule, config: DictConfig, began: int) -> None:
    """Say what is about to be trained, and from which step on."""
    parameters = sum(p.numel() for p in module.network.parameters())
    rank_zero_info(
        f"Training {config.model.name} with {parameters / 1e6:.1f}M parameters for {config.trainer.max_steps} steps of"
        f" {config.data.batch_size} samples, {config.trainer.accelerator} {config.trainer.precision},"
        f" in {os.path.relpath(config.run_dir)}{f', on from step {began}' if began else ''}"
    )


def report_end(trainer: pl.Trainer, run_dir: Path) -> None:
    """Say what to do next."""
    last = Path(os.path.relpath(run_dir / "checkpoints" / "last.ckpt"))
    if was_interrupted(trainer):
        resume = "" if job.inside() else " Resume: the same command with ckpt_path=last"
        rank_zero_info(f"Stopped and saved at step {trainer.global_step}.{resume}")
    elif last.exists():
        rank_zero_info(f"Finished at step {trainer.global_step}. Sample: python -m dcdit.sample checkpoint={last}")
    else:
        rank_zero_info(f"Finished at step {trainer.global_step}.")


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="train")
def main(config: DictConfig) -> float | None:
    """Hydra entry point; returns the validation loss for sweepers that optimise it.

    In a sweep a failed run is reported and counts as NaN; the others go on.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        job.begin(run_dir)
        if sweeping and not job.inside():
            check_local_sweep(config)
        metrics = train(config, run_dir)
        state = RunState.read(run_dir)
        stopped = state is not None and state.state == INTERRUPTED
        job.end(goes_on=stopped, failed=False)
        if stopped and sweeping:
            raise KeyboardInterrupt  # whoever stops a run of a sweep does not ask for the next one
        return metrics.get("val/diffusion_loss")
    except Exception as error:
        lost, together = lost_process(error), torch.distributed.is_initialized()
        if not lost and (rank() == 0 or together):
            note_failure(error, run_dir, task_overrides(), sweeping, together)
        if not sweeping:
            raise
        reason = "another process of the run is gone; its output says why" if lost else explain(error)
        show(f"{os.path.relpath(run_dir)}: {reason or one_line(error)}")
        if reason is None:
            traceback.print_exception(error)
        job.end(goes_on=lost, failed=True)
        return math.nan


def check_local_sweep(config: DictConfig) -> None:
    """Raise :class:`UserError` unless each run of a sweep on this machine is one process."""
    if world_size(config) > 1 or processes()[1] > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}: runs of a sweep"
            " on this machine are one process each. Set trainer.devices=1, start each run by itself, or sweep on a"
            " cluster with cluster=slurm"
        )


if __name__ == "__main__":
    # by its name, under which the processes of a job find it
    from dcdit.train import main as command

    entry_point(command)
