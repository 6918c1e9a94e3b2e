"""Checkpoints that survive a kill at any moment."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

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
class Checkpoint(ModelCheckpoint):
    """A checkpoint every k optimiser steps, ``last.ckpt`` with each of them and at the end of the run.

    Args:
        dirpath: where to.
        every_n_steps: optimiser steps between two checkpoints.
        keep: so many of the newest stay, beside ``last.ckpt``; None keeps all.
        milestone_every: of these steps every checkpoint stays; None for no such steps.

    Raises:
        UserError: if a number is not positive.
    """

    def __init__(self, dirpath: str, every_n_steps: Count, keep: Count | None, milestone_every: Count | None) -> None:
        self.keep, self.milestone_every = keep, milestone_every
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            save_last=True,
            save_top_k=-1,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final step too, wherever it falls. Later than here the average has replaced the raw weights."""
        self.save_now(trainer)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """After each save, drop what need not stay."""
        super()._save_last_checkpoint(trainer, monitor_candidates)
        if trainer.is_global_zero and self.keep is not None and self.dirpath is not None:
            steps = {
                int(path.stem.removeprefix("step_")): path
                for path in Path(self.dirpath).glob(f"step_{'[0-9]' * 8}.ckpt")
            }
            for step in sorted(steps)[: -self.keep]:
                if self.milestone_every is None or step % self.milestone_every:
                    steps[step].unlink(missing_ok=True)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the current step unless that has been done."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
