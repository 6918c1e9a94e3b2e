"""Averages of weights whose length is chosen after training, see :mod:`dcdit.checkpoints.power_ema`."""

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
    """Keeps averages of the network's weights by power functions, and snapshots of them on the way.

    The averages are in every checkpoint. Snapshots are evenly spaced over the steps done: where there would be more
    than ``keep``, every second goes and their distance doubles.

    Args:
        lengths: relative lengths, 0.05 and 0.1 in EDM2; empty for none, which costs nothing.
        dirpath: folder of the snapshots.
        every_n_steps: optimiser steps between two snapshots at first.
        keep: snapshots at the most.

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
        """Bring averages of a checkpoint to the device; forget snapshots of steps that will be done again."""
        parameters = self._parameters(pl_module)
        self._step = trainer.global_step
        for length in self.exponents:
            if not self._step:
                self.averages[length] = {name: each.detach().clone() for name, each in parameters.items()}
                continue
            known = self.averages.get(length, {})
            try:
                check_shapes(shapes_of(known), shapes_of(parameters))
            except UserError as error:
                raise UserError(
                    f"callbacks.power_ema: the checkpoint's average of length {length:g}: {error}"
                ) from error
            self.averages[length] = {name: known[name].to(each.device) for name, each in parameters.items()}
        if trainer.is_global_zero:
            for step, path in snapshots_in(self.folder).items():
                if step > self._step:
                    path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the weights after an optimiser step up into the averages."""
        step = trainer.global_step
        if step == self._step or not self.exponents:
            return
        self._step = step
        parameters = [each.detach() for each in self._parameters(pl_module).values()]
        for length, gamma in self.exponents.items():
            torch._foreach_lerp_(list(self.averages[length].values()), parameters, 1 - decay(step, gamma))
        if step % self.distance(step) == 0 and trainer.is_global_zero and not trainer.lightning_module.ailment:
            self._digests[str(step)] = write_snapshot(self.folder / snapshot_name(step), self.averages)
            for other, path in snapshots_in(self.folder).items():
                if other % self.distance(step):
                    path.unlink(missing_ok=True)
                    self._digests.pop(str(other), None)

    def distance(self, step: int) -> int:
        """Optimiser steps between two snapshots, so many steps into the run."""
        distance = self.every_n_steps
        while step // distance > self.keep:
            distance *= 2
        return distance

    def average_tensors(self) -> list[Tensor]:
        """All averages."""
        return [each for state in self.averages.values() for each in state.values()]

    def _parameters(self, pl_module: Any) -> dict[str, Tensor]:
        return dict(pl_module.network.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """The averages by length, their step, and the digests of snapshots by step; nothing if there are none."""
        if not self.exponents:
            return {}
        averages = {f"{length:g}": state for length, state in self.averages.items()}
        return {"step": self._step, "averages": averages, "snapshots": dict(self._digests)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; it is checked when training begins."""
        self.averages = {float(length): dict(state) for length, state in state_dict["averages"].items()}
        self._digests = dict(state_dict["snapshots"])
