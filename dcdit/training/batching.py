"""How a batch is split over processes and micro-batches."""

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch

from dcdit.checks import shown, to_plain
from dcdit.data.order import micro_batch
from dcdit.errors import UserError
from dcdit.runs.changes import values_to_record
from dcdit.runtime.devices import check_compiler
from dcdit.runtime.processes import processes
from dcdit.training.settings import TrainConfig


def world_size(config: TrainConfig) -> int:
    """Processes that the trainer will use."""
    number = config.trainer.device_count
    if number is None:  # as many as there are
        number = max(1, torch.cuda.device_count()) if config.trainer.on_gpu else 1
    return number * config.trainer.num_nodes


def recorded_settings(config: TrainConfig) -> dict[str, Any]:
    """What the course of a run depends on, by key, and on how many processes it runs."""
    return {**values_to_record(to_plain(config)), "processes": world_size(config)}


def accumulation(config: TrainConfig, world: int) -> int:
    """Micro-batches of an optimiser step on each of ``world`` processes, which keep ``data.batch_size`` what it says.

    Raises:
        UserError: if the batch cannot be split so.
    """
    batch, most, steps = config.batch_size, config.execution.max_micro_batch, config.trainer.accumulate_grad_batches
    if most is not None and steps != 1:
        raise UserError(
            f"execution.max_micro_batch={most} and trainer.accumulate_grad_batches={steps} are two ways to say how a"
            " batch is split, take one"
        )
    if most == "auto" and world > 1:
        raise UserError(
            "execution.max_micro_batch=auto finds a number for one process: find it with trainer.devices=1 and"
            " trainer.max_steps=1, and give that number"
        )
    micro_batch(batch, world, steps)
    if most is None or most == "auto":  # of which dcdit.training.fitting makes a number before anything is built
        return steps
    own = batch // world
    found = next(steps for steps in range(-(-own // most), own + 1) if own % steps == 0)
    if own // found < min(most, own) / 2:
        larger = min(size for size in range(most, own + 1) if own % size == 0)
        part = f"data.batch_size={batch}" + (f" over {world} processes" if world > 1 else "")
        raise UserError(
            f"execution.max_micro_batch={most}: the nearest sizes of micro-batches that divide {part} are"
            f" {own // found} and {larger}. Take one of these, or a data.batch_size with more divisors"
        )
    return found


def describe_split(config: TrainConfig, routes: bool) -> str:
    """Say how the batch is split into micro-batches, and what that changes; empty if it is not.

    Args:
        routes: whether the network has a router.
    """
    world = world_size(config)
    steps, group = accumulation(config, world), config.ratio.group
    size = config.batch_size // (world * steps)
    uneven = routes and world * steps > 1 and (group is None or size % group)
    if steps == 1 and not uneven:
        return ""
    return (
        (f"Micro-batches of {size} samples, {steps} a step" if steps > 1 else f"Parts of {size} samples")
        + (f", on each of {world} processes" if world > 1 else "")
        + (f"; so split, ratio.group={shown(group)} makes other groups for the ratio loss" if uneven else "")
    )


def with_accelerator(config: TrainConfig) -> TrainConfig:
    """``config`` with the accelerator that ``auto`` stands for on this machine: what is recorded is what ran."""
    if config.trainer.accelerator != "auto":
        return config
    kind: Literal["cuda", "mps", "cpu"] = "mps" if torch.backends.mps.is_available() else "cpu"
    return replace(config, trainer=replace(config.trainer, accelerator="cuda" if torch.cuda.is_available() else kind))


def check_precision(config: TrainConfig) -> None:
    """Raise :class:`UserError` if the trainer would compute in another precision than it says.

    Lightning takes bf16 for fp16 on a CPU, and torch's autocast turns itself off where it does not know the type.
    """
    precision, accelerator = config.trainer.precision, config.trainer.accelerator
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(precision).removesuffix("-mixed"))
    if half is None:
        return
    device = "cuda" if config.trainer.on_gpu else accelerator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast(device, half):
            works = torch.is_autocast_enabled(device)
    if not works or (half is torch.float16 and accelerator == "cpu"):
        instead = "bf16-mixed or 32-true" if accelerator == "cpu" else "32-true"
        raise UserError(
            f"trainer.precision={precision}: trainer.accelerator={accelerator} would compute in another precision here,"
            f" take {instead}"
        )


def check_devices(config: TrainConfig) -> None:
    """Raise :class:`UserError` if what is asked for cannot be had: devices, processes, their parts, a compiler."""
    trainer, started = config.trainer, processes()[1]
    if started not in (1, world_size(config)):
        raise UserError(
            f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}, but {started} processes were"
            " started: set trainer.devices to those of each node"
        )
    if trainer.on_gpu and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no usable CUDA device; train on the CPU with"
            " trainer=cpu, or try the run out with debug=tiny"
        )
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "trainer.accelerator=mps: this machine has no usable Apple GPU; train on the CPU with trainer=cpu"
        )
    check_precision(config)
    accumulation(config, world_size(config))
    if config.execution.compile is True:
        check_compiler("execution.compile", "cuda" if trainer.on_gpu else trainer.accelerator)


def check_local_sweep(config: TrainConfig) -> None:
    """Raise :class:`UserError` unless each run of a sweep on this machine is one process."""
    if world_size(config) > 1 or processes()[1] > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}: runs of a sweep"
            " on this machine are one process each. Set trainer.devices=1, start each run by itself, or sweep on a"
            " cluster with cluster=slurm"
        )
