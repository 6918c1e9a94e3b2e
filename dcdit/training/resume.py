"""How a run goes on: its checkpoint is read and compared completely before anything is written.

A checkpoint counts optimiser steps and samples. Lightning's counts of micro-batches, and everything that follows from
the configuration (learning rate, weight decay, schedule), are made anew when a run goes on. So another split of the
batch does not shift a count, and a changed value takes effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from torch import Tensor

from dcdit.checkpoints.load import TrainingCheckpoint, read_trained
from dcdit.checkpoints.read import DamagedError
from dcdit.checks import conform, shown
from dcdit.data.datamodule import StreamState
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.runtime.devices import without_memory
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import check_shapes, shapes_of
from dcdit.training.optimizer_settings import OptimizerSettings

if TYPE_CHECKING:
    from dcdit.training.module import DCDiTModule

_UNTOUCHED = "untouched"
"""Lists the parameters without state in a checkpoint: such as never had a gradient, for AdamW makes a parameter's
state at its first. Without that list they could not be told from those whose state was cut off."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run goes on from.

    Attributes:
        trained: its content.
        settings: what :func:`dcdit.runs.changes.values_to_record` returned when it was written.
        position: the position in the data.
    """

    path: Path
    trained: TrainingCheckpoint
    settings: Mapping[str, Any]
    position: StreamState

    @property
    def step(self) -> int:
        """The number of optimiser steps done."""
        return self.trained.step


def open_first_whole(paths: Sequence[Path]) -> Resumed | None:
    """Read the first of several checkpoints that is not damaged, and say which are; None if there are none.

    Raises:
        UserError: if all are damaged, or the first that is not cannot be gone on from.
    """
    damaged: list[DamagedError] = []
    for path in paths:
        try:
            resumed = _open(path)
        except DamagedError as error:
            if len(paths) == 1:
                raise
            damaged.append(error)
            continue
        for damage in damaged:
            say(f"{damage}. Going on from the one before it, {path.name}, step {resumed.step}")
        return resumed
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {paths[0].parent} is whole, the newest: {damaged[0]}. Restore"
            " one, or start another run with run_name=..."
        )
    return None


def _open(path: Path) -> Resumed:
    trained = read_trained(path)
    values = trained.values
    try:
        settings = conform("settings", values["settings"], dict[str, Any])
        position = conform("LatentDataModule", values["LatentDataModule"], StreamState)
        conform("skipped", values["skipped"], Tensor)
        states = conform("optimizer_states", values["optimizer_states"], list[dict[str, Any]])
        for number, state in conform("state", states[0]["state"], dict[str, Any]).items():
            conform(f"state.{number}", state, dict[str, Tensor])
        conform(_UNTOUCHED, states[0].get(_UNTOUCHED, []), list[int])
    except (KeyError, IndexError) as error:
        raise UserError(f"ckpt_path={path} was not written by dcdit.train: it lacks {error}") from None
    except UserError as error:
        raise UserError(f"ckpt_path={path} cannot be gone on from: {error}") from None
    return Resumed(path, trained, settings, position)


def check_resumed(resumed: Resumed, module: "DCDiTModule", manifest: Manifest) -> None:
    """Check that a run can go on from a checkpoint.

    Raises:
        UserError: with both values, if network, process, alignment, latents or shards differ, or if it contradicts
            itself.
    """
    network, process = module.network, module.process
    # The recorded settings were compared before; what the weights are used with could still differ from them.
    with without_memory():
        networks = build_network(resumed.trained.model).spec, network.spec
    for section, (there, here) in {
        "model": networks,
        "diffusion": (resumed.trained.process.spec, process.spec),
    }.items():
        for key in {**here, **there}:
            if there.get(key) != here.get(key):
                raise UserError(
                    f"{section}.{key}={shown(here.get(key))}: ckpt_path={resumed.path} was trained with"
                    f" {shown(there.get(key))}. Set {section}.{key}={shown(there.get(key))}, or start another run"
                )
    difference = resumed.trained.latents.difference(manifest.spec)
    if difference:
        raise UserError(
            f"the checkpoint was trained on other latents than the shards hold: {difference}. Point data.directory"
            " at the shards it was trained on, or start another run"
        )
    position, samples = resumed.position, manifest.samples
    if position.step != resumed.step or position.samples != samples or position.place.samples > samples:
        raise UserError(
            f"the checkpoint stands at step {position.step} in an epoch of {position.samples} samples, the shards hold"
            f" {samples}: point data.directory at the shards it was trained on, or start another run"
        )
    if position.order != manifest.order:
        raise UserError(
            "the shards are others than those that the checkpoint was trained on, or stand in another order: some"
            " samples of this epoch would come twice, others never. Point data.directory at the shards it was trained"
            " on, or start another run"
        )
    _check_alignment(resumed, module)
    _check_optimizer_state(resumed, module, module.optimizer)
    if resumed.trained.values["skipped"].shape != (2,):
        raise UserError(f"ckpt_path={resumed.path}: skipped is not two counts")


def _check_alignment(resumed: Resumed, module: "DCDiTModule") -> None:
    """Raise :class:`UserError` unless the checkpoint holds what this alignment trains, with the same encoder."""
    there = resumed.trained.training.get("alignment") or {}
    here = module.alignment.record if module.alignment is not None else {}
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            raise UserError(
                f"alignment: the run was trained with {key}={shown(there.get(key))}, now it is {shown(here.get(key))}."
                " Take the same encoder and weights, or start another run with run_name=..."
            )
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if name.startswith("alignment.")}
    values = resumed.trained.values
    for key in ("state_dict", "current_model_state"):
        state = {name: tensor for name, tensor in values.get(key, {}).items() if name.startswith("alignment.")}
        if key in values:
            check_shapes(shapes_of(state), expected)


def _check_optimizer_state(resumed: Resumed, module: "DCDiTModule", settings: OptimizerSettings) -> None:
    """Raise :class:`UserError` unless each trained parameter has its optimiser's state, or none, never needing one."""
    optimizer = resumed.trained.values["optimizer_states"][0]
    untouched = set(optimizer.get(_UNTOUCHED, ()))
    matrices = settings.matrices(module.network)
    trained = {
        number: (name.removeprefix("network."), parameter)
        for number, (name, parameter) in enumerate(module.named_parameters())
        if parameter.requires_grad
    }
    for number in {**trained, **optimizer["state"]}:
        name, parameter = trained.get(number, (f"number {shown(number)}, which is not trained", None))
        kind, shape = "Muon" if parameter in matrices else "AdamW", parameter.shape if parameter is not None else None
        shapes = {key: tensor.shape for key, tensor in optimizer["state"].get(number, {}).items()}
        expected = {
            "Muon": {"momentum_buffer": shape},
            "AdamW": {"step": torch.Size(()), "exp_avg": shape, "exp_avg_sq": shape},
        }[kind]
        if shapes != ({} if number in untouched and number in trained else expected):
            raise UserError(
                f"ckpt_path={resumed.path}: the optimiser's state of parameter {name} is not that of {kind}: take"
                " another checkpoint of the run"
            )


def strip_lightning_state(checkpoint: dict[str, Any], settings: Mapping[str, object]) -> None:
    """Remove from a checkpoint what :func:`restore_lightning_state` makes anew, and add what was trained with."""
    for key in ("loops", "lr_schedulers", "epoch", "hparams_name", "pytorch-lightning_version"):
        checkpoint.pop(key, None)
    (optimizer,) = checkpoint["optimizer_states"]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    untouched = [number for number in numbers if number not in optimizer["state"]]
    checkpoint["optimizer_states"] = [{"state": optimizer["state"], _UNTOUCHED: untouched}]
    checkpoint["settings"] = dict(settings)


def restore_lightning_state(
    checkpoint: dict[str, Any],
    trainer: pl.Trainer,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """Add to a stored checkpoint the state that Lightning restores.

    Args:
        checkpoint: as it was stored; is changed.
        trainer: of the run that goes on.
        optimizer, schedule: as the configuration says now, before the first step.
    """
    step = int(checkpoint["global_step"])
    rates = [
        base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]  # as LambdaLR computes them
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    checkpoint["optimizer_states"] = [{"state": checkpoint["optimizer_states"][0]["state"], "param_groups": groups}]
    position = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    checkpoint["lr_schedulers"] = [{**schedule.state_dict(), **position}]
    checkpoint["loops"] = {"fit_loop": _fit_loop_state(trainer, step)}
    checkpoint["epoch"] = 0  # there is only one, which never ends
    own = {callback.state_key: callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
    checkpoint["callbacks"] = {
        key: {"latest_update_step": step} if isinstance(own[key], callbacks.WeightAveraging) else state
        for key, state in checkpoint.get("callbacks", {}).items()
        # The configuration alone decides where checkpoints are written, never a file.
        if key in own and not isinstance(own[key], callbacks.Checkpoint)
    }


def _fit_loop_state(trainer: pl.Trainer, step: int) -> dict[str, Any]:
    """The state of Lightning's loops after so many optimiser steps of one endless epoch, before their validation.

    The keys and counters are Lightning's own, and may change with any release of it. A key that is gone raises a
    KeyError here. A counter that means something else shifts the next step, batch or validation of a resumed run: the
    tests that a resumed run has the same bits as an uninterrupted one fail then (``tests/training/test_resume.py``).
    """
    batches = step * trainer.accumulate_grad_batches
    state: dict[str, Any] = trainer.fit_loop.state_dict()
    counts = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    steps = {"ready": step, "completed": step}
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": step - 1}
    state["epoch_loop.batch_progress"] |= {"total": counts, "current": dict(counts)}
    state["epoch_loop.scheduler_progress"] = {"total": steps, "current": dict(steps)}
    zeroed = {**steps, "started": step}
    state["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {"total": dict(steps), "current": dict(steps)},
            "zero_grad": {"total": zeroed, "current": dict(zeroed)},
        }
    }
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    state["epoch_progress"] = {"total": epoch, "current": dict(epoch)}
    return state


def check_same_step(trainer: pl.Trainer, step: int) -> None:
    """Raise :class:`UserError` if the processes of a run go on from different steps."""
    if trainer.world_size > 1:
        main_step = trainer.strategy.broadcast(step)
        agreed = trainer.strategy.reduce_boolean_decision(main_step == step)
        if not agreed:
            raise UserError(
                f"ckpt_path: the processes of the run see different checkpoints (step {shown(main_step)} and others):"
                " wait until the file system shows the same everywhere, or name a checkpoint with ckpt_path=..."
            )
