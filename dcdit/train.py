"""Train or resume: ``python -m dcdit.train experiment=digits``."""

import math
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dcdit.callbacks import StopOnInterrupt
from dcdit.cli import CONFIG_DIR, entry_point, explain, show
from dcdit.composed import build_data, build_module, build_trainer, check_devices, check_fit, match_compute
from dcdit.errors import UserError
from dcdit.module import DCDiTModule
from dcdit.run_state import (
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunState,
    note_failure,
    one_line,
    sole_writer,
)
from dcdit.runtime import keep_freed_memory


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


@rank_zero_only
def save_config(config: DictConfig, run_dir: Path) -> None:
    """Write the resolved configuration beside the checkpoints."""
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)


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
    with sole_writer(run_dir, rank()):
        checkpoint = find_checkpoint(config, run_dir)
        before = RunState.read(run_dir) if checkpoint else None
        if before and before.state == FINISHED and before.step >= config.trainer.max_steps:
            rank_zero_info(
                f"{os.path.relpath(run_dir)} is finished, at step {before.step}: train on with a larger"
                " trainer.max_steps"
            )
            return dict(before.metrics)
        check_devices(config)
        return fit(config, run_dir, checkpoint)


def fit(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> dict[str, float]:
    """Train in ``run_dir``, which this process holds, from ``checkpoint`` on; returns the last metrics."""
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
    if config.trainer.accelerator == "cpu":
        module.network.to(memory_format=torch.channels_last)
    trainer = build_trainer(config)
    report_start(module, config)
    save_config(config, run_dir)
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    state = RunState(RUNNING, max_steps=config.trainer.max_steps, overrides=task_overrides())
    note(state, run_dir)
    trainer.fit(module, data, ckpt_path=checkpoint)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ended = INTERRUPTED if was_interrupted(trainer) else FINISHED
    note(replace(state, state=ended, step=trainer.global_step, metrics=metrics, time=time.time()), run_dir)
    report_end(trainer, run_dir)
    return metrics


def rank() -> int:
    """Of this process, known before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def task_overrides() -> tuple[str, ...]:
    """What was given on the command line; nothing where there is none."""
    return tuple(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()


@rank_zero_only
def note(state: RunState, run_dir: Path) -> None:
    """Write down what becomes of the run."""
    state.write(run_dir)


def was_interrupted(trainer: pl.Trainer) -> bool:
    """Whether a signal ended the training; one that came in the last step did not."""
    callbacks: Sequence[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    signalled = any(isinstance(callback, StopOnInterrupt) and callback.interrupted for callback in callbacks)
    return signalled and trainer.global_step < trainer.max_steps


def report_start(module: DCDiTModule, config: DictConfig) -> None:
    """Say what is about to be trained."""
    parameters = sum(p.numel() for p in module.network.parameters())
    rank_zero_info(
        f"Training {config.model.name} with {parameters / 1e6:.1f}M parameters for {config.trainer.max_steps} steps of"
        f" {config.data.batch_size} samples, {config.trainer.accelerator} {config.trainer.precision},"
        f" in {os.path.relpath(config.run_dir)}"
    )


def report_end(trainer: pl.Trainer, run_dir: Path) -> None:
    """Say what to do next."""
    last = Path(os.path.relpath(run_dir / "checkpoints" / "last.ckpt"))
    if was_interrupted(trainer):
        rank_zero_info(f"Stopped and saved at step {trainer.global_step}. Resume: the same command with ckpt_path=last")
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
        return train(config, run_dir).get("val/diffusion_loss")
    except Exception as error:
        if rank() == 0:
            note_failure(error, run_dir, task_overrides(), sweeping)
        if not sweeping:
            raise
        show(f"{os.path.relpath(run_dir)}: {explain(error) or one_line(error)}")
        if explain(error) is None:
            traceback.print_exception(error)
        return math.nan


if __name__ == "__main__":
    entry_point(main)
