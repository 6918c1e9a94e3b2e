"""Averages of weights by power functions, see :mod:`dcdit.checkpoints.power_ema`; their length is chosen later."""

from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dcdit.checkpoints.power_ema import STATE, decay, exponent, snapshot_name, snapshots_in, write_snapshot
from dcdit.checkpoints.settings import Length
from dcdit.checks import Bounds, Count, checked
from dcdit.errors import UserError
from dcdit.runtime.tensors import check_shapes, shapes_of


@checked
class PowerEMA(Callback):
    """Keeps averages of the network's weights by power functions, and writes snapshots of them during training.

    The averages are in every checkpoint. Snapshots are evenly spaced over the steps done: when there would be more than
    ``keep``, every second one is deleted and their distance doubles.

    Args:
        lengths: relative lengths, 0.05 and 0.1 in EDM2; empty for none, which costs nothing.
        dirpath: folder of the snapshots.
        every_n_steps: optimiser steps between two snapshots at first.
        keep: the most snapshots that are kept.

    Raises:
        UserError: if a value is out of its range.
    """

    state_key = STATE

    def __init__(
        self,
        lengths: list[Length],
        dirpath: str,
        every_n_steps: Count,
        keep: Annotated[int, Bounds(2, 1000, hint="two snapshots are the least, a dozen is plenty")],
    ) -> None:
        if len(set(lengths)) < len(lengths):
            raise UserError(f"lengths={lengths}: one is there twice")
        self.exponents = {length: exponent(length) for length in lengths}
        self.folder, self.every_n_steps, self.keep = Path(dirpath), every_n_steps, keep
        self.averages: dict[float, dict[str, Tensor]] = {}
        self._digests: dict[str, str] = {}  # of the snapshots' files, by step
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the averages of a checkpoint to the device, and delete snapshots of steps that will be done again."""
        parameters = self._parameters(pl_module)
        self._step = trainer.global_step
        for length in self.exponents:
            if not self._step:
                self.averages[length] = {name: weight.detach().clone() for name, weight in parameters.items()}
                continue
            average = self.averages.get(length, {})
            try:
                check_shapes(shapes_of(average), shapes_of(parameters))
            except UserError as error:
                raise UserError(
                    f"callbacks.power_ema: the checkpoint's average of length {length:g}: {error}"
                ) from error
            self.averages[length] = {name: average[name].to(weight.device) for name, weight in parameters.items()}
        if trainer.is_global_zero:
            for step, path in snapshots_in(self.folder).items():
                if step > self._step:
                    path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Add the weights after an optimiser step to the averages, and write a snapshot when one is due."""
        step = trainer.global_step
        if step == self._step or not self.exponents:
            return
        self._step = step
        parameters = [weight.detach() for weight in self._parameters(pl_module).values()]
        for length, gamma in self.exponents.items():
            torch._foreach_lerp_(list(self.averages[length].values()), parameters, 1 - decay(step, gamma))
        if step % self.distance(step) == 0 and trainer.is_global_zero and not trainer.lightning_module.ailment:
            self._digests[str(step)] = write_snapshot(self.folder / snapshot_name(step), self.averages)
            for other, path in snapshots_in(self.folder).items():
                if other % self.distance(step):
                    path.unlink(missing_ok=True)
                    self._digests.pop(str(other), None)

    def distance(self, step: int) -> int:
        """The distance between two snapshots, in optimiser steps, after ``step`` steps."""
        distance = self.every_n_steps
        while step // distance > self.keep:
            distance *= 2
        return distance

    def average_tensors(self) -> list[Tensor]:
        """The tensors of all averages."""
        return [tensor for average in self.averages.values() for tensor in average.values()]

    def _parameters(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return dict(pl_module.get_submodule("network").named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """The averages by length, their step, and the digests of snapshots by step; empty if there are none."""
        if not self.exponents:
            return {}
        averages = {f"{length:g}": state for length, state in self.averages.items()}
        return {"step": self._step, "averages": averages, "snapshots": dict(self._digests)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; it is checked when training begins."""
        self.averages = {float(length): dict(state) for length, state in state_dict["averages"].items()}
        self._digests = dict(state_dict["snapshots"])
