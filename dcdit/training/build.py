"""From a checked plan to what trains: module, data, trainer."""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.errors import InstantiationException
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from dcdit.checks import annotations, call_checked, conform, shown, suggestion
from dcdit.compute.matching import steps_matching
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.runtime.devices import without_memory
from dcdit.runtime.processes import launched, say
from dcdit.settings.entry import model_config
from dcdit.settings.help import choices
from dcdit.training.batching import accumulation, world_size
from dcdit.training.callbacks.checkpoint import AtomicCheckpointIO
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.module import DCDiTModule
from dcdit.training.settings import TrainPlan

_OURS = frozenset({"callbacks", "logger", "plugins", "enable_progress_bar"})
"""Arguments of Lightning's Trainer that are built here."""


def match_compute(plan: TrainPlan) -> TrainPlan:
    """``plan`` with as many steps as cost what its baseline does, where it names one.

    Raises:
        UserError: if the lengths cannot be matched.
    """
    baseline, steps = plan.match_compute.baseline, plan.match_compute.steps
    if baseline is None:
        return plan
    if baseline not in choices("model"):
        raise UserError(f"match_compute.baseline={shown(baseline)} is not one of {', '.join(choices('model'))}")
    spec = plan.values["model"]
    # The baseline sees the same latents, whatever its file says.
    other = model_config(baseline) | {key: spec[key] for key in ("grid", "channels", "num_classes")}
    with without_memory():
        networks = build_network(spec), build_network(other)
    budgets = plan.multi_budget
    found = steps_matching(*networks, steps, plan.run.compression, budgets.fractions, budgets.full_budget_steps)
    say(f"{found} steps cost as much as {steps} of {baseline}")
    return replace(plan, trainer=replace(plan.trainer, max_steps=found))


def build_module(plan: TrainPlan, latents: LatentSpec | None) -> DCDiTModule:
    """The LightningModule; UserError if a value is wrong.

    Args:
        plan: what is trained.
        latents: what it is trained on; None while that is not known yet.
    """
    return DCDiTModule(
        model=plan.values["model"],
        diffusion=plan.values["diffusion"],
        latents=latents.to_plain() if latents else {},
        compression=plan.run.compression,
        ratio=asdict(plan.ratio),
        multi_budget=asdict(plan.multi_budget),
        optimizer=asdict(plan.optimizer),
        max_steps=plan.trainer.max_steps,
        seed=plan.run.seed,
        nonfinite_limit=plan.run.nonfinite_limit,
        balance_timesteps=plan.run.balance_timesteps,
        init={},
    )


def check_network(plan: TrainPlan) -> None:
    """Build everything that takes neither data nor memory; UserError if a value is wrong. Cheap at any scale."""
    with without_memory():
        build_module(plan, None)


def build_data(plan: TrainPlan) -> LatentDataModule:
    """The LightningDataModule; UserError if a value is wrong."""
    return call_checked(LatentDataModule, plan.values.get("data"), "data")


def build_each(nodes: Any, section: str) -> list[Any]:
    """What a section of objects describes, such as callbacks; nodes that are null are left out.

    Raises:
        UserError: if one cannot be built, naming its place.
    """
    if nodes is not None and not isinstance(nodes, DictConfig):
        raise UserError(f"{section}={nodes!r}: {section} is a group and a section, choose one or set its keys")
    found = []
    for name, node in (nodes or {}).items():
        if node is None:
            continue
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{section}.{name!s}={node}: it is a section with keys of its own, or null to leave it out")
        where = f"{section}.{name!s}"
        try:
            found.append(hydra.utils.instantiate(node))
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, UserError):
                raise UserError(_below(where, str(cause))) from cause
            if isinstance(cause, TypeError | ValueError | ImportError | AttributeError) or cause is None:
                words = str(cause) if cause else str(error).splitlines()[0]
                raise UserError(f"{where}: {' '.join(words.split())}") from error
            raise cause from error
        except MissingMandatoryValue as error:
            raise UserError(f"{error.full_key} is not set: give {error.full_key}=...") from None
    return found


def _below(section: str, message: str) -> str:
    """A message about keys, such as those of a feature network, with the keys that they have below ``section``."""
    group = re.sub(r"(?<![\w.@])features=", f"features@{section}.features=", message)
    found = re.sub(r"(?<![\w.@])features\.", f"{section}.features.", group)
    return found if section in found else f"{section}.{found}"


def build_trainer(
    plan: TrainPlan, config: DictConfig, interrupt: StopOnInterrupt, opened: Mapping[str, Any] | None = None
) -> pl.Trainer:
    """The Trainer with its callbacks and loggers.

    Args:
        plan: what is trained.
        config: whose callbacks and loggers are built.
        interrupt: stops at a signal.
        opened: content of the checkpoint that the run goes on from.

    Raises:
        UserError: if a value is wrong.
    """
    callbacks = [*build_each(config.get("callbacks"), "callbacks"), interrupt]
    loggers = build_each(config.get("logger"), "logger")
    arguments: dict[str, Any] = {**plan.values["trainer"], **asdict(plan.trainer)}
    known = {key: hint for key, hint in annotations(pl.Trainer).items() if key not in _OURS}
    for key in arguments.keys() - asdict(plan.trainer).keys():
        if key not in known:
            raise UserError(
                f"trainer.{key}={shown(arguments[key])}: Lightning's Trainer has no such key, or it is not for setting;"
                f" {suggestion(key, known)}"
            )
        conform(f"trainer.{key}", arguments[key], known[key])
    arguments["accumulate_grad_batches"] = accumulate = accumulation(plan, world_size(plan))
    if isinstance(arguments["val_check_interval"], int):
        arguments["val_check_interval"] *= accumulate  # Lightning counts micro-batches
    arguments["enable_progress_bar"] = (config.get("callbacks") or {}).get("progress") is not None
    environment = cluster_environment()
    plugins = [AtomicCheckpointIO(dict(opened) if opened else None), *([environment] if environment else [])]
    return _trainer({**arguments, "callbacks": callbacks, "logger": loggers or False, "plugins": plugins})


def _trainer(arguments: Mapping[str, Any]) -> pl.Trainer:
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, ImportError) as error:  # its own checks
        message = str(error).splitlines()[0]
        named = [f".{key}={arguments[key]}" for key in arguments if key in message.lower()]
        raise UserError(f"trainer{named[0] if named else ''}: {message}") from error


def cluster_environment() -> ClusterEnvironment | None:
    """Whoever started this process as one of several, for Lightning. Queueing again is not its business."""
    launch = launched()
    if launch is not None:
        return TorchElasticEnvironment() if launch.by == "torchrun" else SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment() if SLURMEnvironment.detect() else None  # inside an allocation, but not by srun
