"""Checkpoints that survive a kill at any moment."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import callbacks

from dcdit.checks import Count, checked
from dcdit.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk and renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace ``path`` by ``checkpoint`` at once or not at all; UserError if the disk does not take it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.part")
        try:
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            raise UserError(
                f"checkpoint {target} cannot be written ({error}): make room on the disk, then resume with"
                " ckpt_path=last; earlier checkpoints are whole"
            ) from error
        draft.replace(target)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load ``path`` onto the CPU, without ever running pickled code."""
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)


@checked
class Checkpoint(callbacks.Checkpoint):
    """A checkpoint every k optimiser steps and at the end of the run; ``last.ckpt`` is the newest of them.

    Args:
        dirpath: where to.
        every_n_steps: optimiser steps between two checkpoints.
        keep: so many of the newest stay; None keeps all.
        milestone_every: of these steps every checkpoint stays; None for no such steps.

    Raises:
        UserError: if a number is not positive.
    """

    def __init__(self, dirpath: str, every_n_steps: Count, keep: Count | None, milestone_every: Count | None) -> None:
        self.folder, self.every_n_steps = Path(dirpath), every_n_steps
        self.keep, self.milestone_every = keep, milestone_every
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a run begins or goes on there is nothing to save."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every k optimiser steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final step too, wherever it falls. Later than here the average has replaced the raw weights."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current step unless that has been done, and drop what need not stay."""
        step = trainer.global_step
        if step == self._saved or trainer.sanity_checking:
            return
        path = self.folder / f"step_{step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # all of it: moments and position too
        self._saved = step
        if trainer.is_global_zero:
            self._point_to(path)
            self._prune()

    def _point_to(self, path: Path) -> None:
        """Make ``last.ckpt`` the same file as ``path``; a copy where the file system has no links."""
        draft = self.folder / ".last.ckpt.part"
        draft.unlink(missing_ok=True)
        try:
            os.link(path, draft)
        except OSError:
            shutil.copyfile(path, draft)
        draft.replace(self.folder / "last.ckpt")

    def _prune(self) -> None:
        if self.keep is None:
            return
        steps = {int(path.stem.removeprefix("step_")): path for path in self.folder.glob(f"step_{'[0-9]' * 8}.ckpt")}
        for step in sorted(steps)[: -self.keep]:
            if self.milestone_every is None or step % self.milestone_every:
                steps[step].unlink(missing_ok=True)
