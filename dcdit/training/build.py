"""From a configuration to Lightning's trainer, and what is checked of it before."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from dcdit.checks import annotations, conform, shown, suggestion, to_plain
from dcdit.compute.matching import steps_matching
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.runtime.devices import without_memory
from dcdit.runtime.processes import launched, say
from dcdit.settings.compose import model_config, with_run_id
from dcdit.settings.help import choices
from dcdit.settings.instantiate import instantiated
from dcdit.training.alignment.build import cost_of_alignment
from dcdit.training.batching import accumulation, world_size
from dcdit.training.callbacks.checkpoint import AtomicCheckpointIO
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.module import check_fit
from dcdit.training.settings import TrainConfig

_OURS = frozenset({"callbacks", "logger", "plugins", "enable_progress_bar"})
"""Arguments of Lightning's Trainer that are built here."""


def match_compute(config: TrainConfig) -> TrainConfig:
    """``config`` with as many steps as cost what its baseline does, where it names one.

    Raises:
        UserError: if the lengths cannot be matched.
    """
    baseline, steps = config.match_compute.baseline, config.match_compute.steps
    if baseline is None:
        return config
    if baseline not in choices("model"):
        raise UserError(f"match_compute.baseline={shown(baseline)} is not one of {', '.join(choices('model'))}")
    spec = config.model
    # The baseline sees the same latents, whatever its file says.
    other = model_config(baseline) | {key: spec[key] for key in ("grid", "channels", "num_classes")}
    with without_memory():
        networks = build_network(spec), build_network(other)
    budgets, beside = config.multi_budget, cost_of_alignment(config.alignment, networks[0])
    equal = steps_matching(
        *networks,
        steps,
        config.compression,
        budgets.fractions,
        budgets.full_budget_steps,
        path_drop=budgets.path_drop,
        beside=beside,
    )
    say(f"{equal} steps cost as much as {steps} of {baseline}")
    return replace(config, trainer=replace(config.trainer, max_steps=equal))


def check_network(config: TrainConfig) -> TrainConfig:
    """Raise :class:`UserError` unless network, process and training fit together. Takes no memory at any scale.

    Returns:
        ``config``, with what ``diffusion.shift=auto`` comes to for the latents of the network.
    """
    with without_memory():
        network = build_network(config.model)
        config = replace(config, diffusion=config.diffusion.for_latents(network.channels * network.positions))
        check_fit(network, config.diffusion.build(), config)
    return config


def build_each(nodes: Mapping[str, Any] | None, section: str, run_id: str) -> list[Any]:
    """Instantiate the nodes of a section, such as ``callbacks``; those that are null are left out.

    Raises:
        UserError: if one cannot be built, naming its key.
    """
    objects = []
    for name, node in with_run_id(nodes or {}, run_id).items():
        if node is None:
            continue
        where = f"{section}.{name!s}"
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise UserError(f"{where}={node}: it is a section with keys of its own, or null to leave it out")
        try:
            objects.append(instantiated(node, where))
        except UserError as error:
            raise UserError(_below(where, str(error))) from error
    return objects


def _below(section: str, message: str) -> str:
    """A message about keys, such as those of a feature network, with the keys that they have below ``section``."""
    message = re.sub(r"(?<![\w.@])features=", f"features@{section}.features=", message)
    message = re.sub(r"(?<![\w.@])features\.", f"{section}.features.", message)
    return message if section in message else f"{section}.{message}"


def build_trainer(
    config: TrainConfig, interrupt: StopOnInterrupt, run_id: str = "", opened: Mapping[str, Any] | None = None
) -> pl.Trainer:
    """The Trainer with its callbacks and loggers.

    Args:
        run_id: of the run, for loggers.
        opened: content of the checkpoint that the run goes on from.

    Raises:
        UserError: if a value is wrong.
    """
    callbacks = [*build_each(config.callbacks, "callbacks", run_id), interrupt]
    loggers = build_each(config.logger, "logger", run_id)
    arguments: dict[str, Any] = to_plain(config.trainer)
    known = {key: hint for key, hint in annotations(pl.Trainer).items() if key not in _OURS}
    for key in config.trainer.others:
        if key not in known:
            raise UserError(
                f"trainer.{key}={shown(arguments[key])}: Lightning's Trainer has no such key, or it is not for setting;"
                f" {suggestion(key, known)}"
            )
        conform(f"trainer.{key}", arguments[key], known[key])
    arguments["accumulate_grad_batches"] = accumulate = accumulation(config, world_size(config))
    if isinstance(arguments["val_check_interval"], int):
        arguments["val_check_interval"] *= accumulate  # Lightning counts micro-batches
    arguments["enable_progress_bar"] = (config.callbacks or {}).get("progress") is not None
    environment = cluster_environment()
    plugins = [AtomicCheckpointIO(dict(opened) if opened else None), *([environment] if environment else [])]
    arguments |= {"callbacks": callbacks, "logger": loggers or False, "plugins": plugins}
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, ImportError) as error:  # its own checks
        message = str(error).splitlines()[0]
        named = [f".{key}={arguments[key]}" for key in arguments if key in message.lower()]
        raise UserError(f"trainer{named[0] if named else ''}: {message}") from error


def cluster_environment() -> ClusterEnvironment | None:
    """Tell Lightning who started this process as one of several; it shall not queue jobs again itself."""
    launch = launched()
    if launch.by:
        return TorchElasticEnvironment() if launch.by == "torchrun" else SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment() if SLURMEnvironment.detect() else None  # inside an allocation, but not by srun
