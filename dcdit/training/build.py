"""From a composed configuration to what trains: module, data, trainer; every mistake is found here."""

from dataclasses import dataclass
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf

from dcdit.checks import micro_batch
from dcdit.compute.matching import steps_matching
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.runtime.processes import launcher, processes
from dcdit.settings.entry import model_config
from dcdit.settings.schema import call_checked
from dcdit.settings.tables import build_network, build_source
from dcdit.training.callbacks import AtomicCheckpointIO
from dcdit.training.module import DCDiTModule
from dcdit.training.objective import Budget


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
    run_id: str | None
    nonfinite_limit: int
    deal_timesteps: bool


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
        deal_timesteps=run.deal_timesteps,
    )


def build_data(config: DictConfig) -> LatentDataModule:
    """The LightningDataModule of a composed configuration."""
    values: Any = OmegaConf.to_container(config.data, resolve=True)
    spec = values.pop("source")
    return call_checked(LatentDataModule, values, "data", {"source": build_source(spec) if spec else None})


def world_size(config: DictConfig) -> int:
    """Processes that the trainer will use."""
    devices, on_gpu = config.trainer.devices, config.trainer.accelerator in ("gpu", "cuda")
    if isinstance(devices, ListConfig):
        number = len(devices)
    elif isinstance(devices, int) and devices > 0:
        number = devices
    else:  # -1 and "auto"
        number = max(1, torch.cuda.device_count()) if on_gpu else 1
    return number * config.trainer.num_nodes


def accumulation(config: DictConfig, world: int) -> int:
    """Micro-batches of an optimiser step on each of ``world`` processes, which keep ``data.batch_size`` what it says.

    Raises:
        UserError: if the batch cannot be split so.
    """
    batch, most, steps = config.data.batch_size, config.trainer.max_micro_batch, config.trainer.accumulate_grad_batches
    if most is not None and steps != 1:
        raise UserError(
            f"trainer.max_micro_batch={most} and trainer.accumulate_grad_batches={steps} are two ways to say how a"
            " batch is split, take one"
        )
    micro_batch(batch, world, steps)
    if most is None:
        return steps
    if most < 1:
        raise UserError(f"trainer.max_micro_batch={most} is not a positive number")
    own = batch // world
    return next(steps for steps in range(-(-own // most), own + 1) if own % steps == 0)


def check_devices(config: DictConfig) -> None:
    """Raise :class:`UserError` if the trainer asks for a GPU that is not there, or not for the processes that are."""
    started, wanted = processes()[1], world_size(config)
    if started not in (1, wanted):
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}, but"
            f" {started} processes were started: set trainer.devices to those of each node"
        )
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={config.trainer.accelerator}: this machine has no usable CUDA device; train on the"
            " CPU with trainer=cpu, or try the run out with debug=tiny"
        )


def build_trainer(config: DictConfig) -> pl.Trainer:
    """The Trainer with its callbacks and loggers."""
    callbacks = [hydra.utils.instantiate(node) for node in (config.callbacks or {}).values() if node]
    loggers = [hydra.utils.instantiate(node) for node in (config.logger or {}).values() if node]
    own = ("match_compute_of", "match_steps", "max_micro_batch", "compile", "recompute_activations")
    arguments = {key: value for key, value in config.trainer.items() if key not in own}
    arguments["accumulate_grad_batches"] = accumulate = accumulation(config, world_size(config))
    if isinstance(arguments["val_check_interval"], int):
        arguments["val_check_interval"] *= accumulate  # Lightning counts micro-batches
    environment = launcher()
    if environment is None and SLURMEnvironment.detect():  # inside an allocation, but not by srun
        environment = LightningEnvironment()
    plugins = [AtomicCheckpointIO(), *([environment] if environment else [])]
    arguments["enable_progress_bar"] = (config.callbacks or {}).get("progress") is not None
    return hydra.utils.instantiate(arguments, callbacks=callbacks, logger=loggers or False, plugins=plugins)
