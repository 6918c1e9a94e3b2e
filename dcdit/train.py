"""Train or resume: ``python -m dcdit.train experiment=digits``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from dcdit.callbacks import AtomicCheckpointIO, StopOnInterrupt
from dcdit.cli import CONFIG_DIR, entry_point, model_config
from dcdit.config import call_checked
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.evaluation.matching import steps_matching
from dcdit.module import Budget, DCDiTModule
from dcdit.registry import build_network, build_source
from dcdit.runtime import keep_freed_memory


def check_fit(manifest: Manifest, model: dict[str, Any]) -> None:
    """Raise :class:`UserError` unless the network that ``model`` describes takes the latents of ``manifest``."""
    channels, height, width = manifest.latent_shape
    pairs = [
        ("grid", model["grid"], height if height == width else (height, width)),
        ("channels", model["channels"], channels),
        ("num_classes", model["num_classes"], len(manifest.classes)),
    ]
    for name, wanted, found in pairs:
        if wanted != found:
            raise UserError(
                f"model.{name}={wanted} does not fit the shards, which have {found}"
                f" (latents {channels} x {height} x {width}, {len(manifest.classes)} classes):"
                f" set model.{name}={found}, or point data.directory at other shards"
            )


@dataclass(frozen=True)
class Run:
    """The keys at the top of ``configs/train.yaml``."""

    compression: float
    seed: int
    run_name: str
    run_dir: str
    ckpt_path: str | None
    nonfinite_limit: int


def match_compute(config: DictConfig) -> None:
    """Where ``trainer.match_compute_of`` names a model, set ``trainer.max_steps`` to match its training compute.

    Raises:
        UserError: if the lengths cannot be matched.
    """
    name, steps = config.trainer.match_compute_of, config.trainer.match_steps
    if name is None:
        return
    spec: Any = OmegaConf.to_container(config.model, resolve=True)
    # The baseline sees the same latents, whatever its file says.
    baseline = model_config(name) | {key: spec[key] for key in ("grid", "channels", "num_classes")}
    budget = call_checked(Budget, OmegaConf.to_container(config.budget, resolve=True), "budget")  # type: ignore[arg-type]
    with torch.device("meta"):
        networks = build_network(spec), build_network(baseline)
    config.trainer.max_steps = steps_matching(*networks, steps, config.compression, budget.fractions, budget.warmup)
    rank_zero_info(f"{config.trainer.max_steps} steps cost as much as {steps} of {name}")


def build_module(config: DictConfig, latents: dict[str, Any]) -> DCDiTModule:
    """The LightningModule of a composed configuration; UserError if a value is wrong."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    run = call_checked(Run, {name: value for name, value in plain.items() if not isinstance(value, dict)}, "")
    max_steps = plain["trainer"]["max_steps"]
    if not isinstance(max_steps, int) or max_steps < 1:
        raise UserError(
            f"trainer.max_steps={max_steps!r} is not a whole number of at least 1: give the steps of the run"
        )
    fractions = plain["budget"].get("fractions")
    if plain["model"]["name"] == "dit" and fractions:
        raise UserError(f"budget.fractions={fractions}: a plain DiT drops no tokens, set budget=none")
    return DCDiTModule(
        model=plain["model"],
        latents=latents,
        compression=run.compression,
        ratio=plain["ratio"],
        budget=plain["budget"],
        optimizer=plain["optimizer"],
        max_steps=max_steps,
        seed=run.seed,
        nonfinite_limit=run.nonfinite_limit,
    )


def build_data(config: DictConfig) -> LatentDataModule:
    """The LightningDataModule of a composed configuration."""
    values: Any = OmegaConf.to_container(config.data, resolve=True)
    spec = values.pop("source")
    return call_checked(LatentDataModule, values, "data", {"source": build_source(spec) if spec else None})


def check_devices(config: DictConfig) -> None:
    """Raise :class:`UserError` if the trainer asks for a GPU that is not there."""
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={config.trainer.accelerator}: this machine has no usable CUDA device; train on the"
            " CPU with trainer=cpu, or try the run out with debug=tiny"
        )


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


def build_trainer(config: DictConfig) -> pl.Trainer:
    """The Trainer with its callbacks and loggers."""
    callbacks = [hydra.utils.instantiate(node) for node in (config.callbacks or {}).values() if node]
    loggers = [hydra.utils.instantiate(node) for node in (config.logger or {}).values() if node]
    arguments = {key: value for key, value in config.trainer.items() if not str(key).startswith("match_")}
    arguments["enable_progress_bar"] = (config.callbacks or {}).get("progress") is not None
    return hydra.utils.instantiate(
        arguments, callbacks=callbacks, logger=loggers or False, plugins=[AtomicCheckpointIO()]
    )


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
    checkpoint = find_checkpoint(config, run_dir)
    check_devices(config)
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
    trainer.fit(module, data, ckpt_path=checkpoint)
    report_end(trainer, run_dir)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


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
    interrupted = any(isinstance(c, StopOnInterrupt) and c.interrupted for c in trainer.callbacks)  # type: ignore[attr-defined]
    last = Path(os.path.relpath(run_dir / "checkpoints" / "last.ckpt"))
    if interrupted:
        rank_zero_info(f"Stopped and saved at step {trainer.global_step}. Resume: the same command with ckpt_path=last")
    elif last.exists():
        rank_zero_info(f"Finished at step {trainer.global_step}. Sample: python -m dcdit.sample checkpoint={last}")
    else:
        rank_zero_info(f"Finished at step {trainer.global_step}.")


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="train")
def main(config: DictConfig) -> float | None:
    """Hydra entry point; returns the validation loss for sweepers that optimise it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    return train(config, run_dir).get("val/diffusion_loss")


if __name__ == "__main__":
    entry_point(main)
