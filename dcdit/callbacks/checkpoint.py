"""Checkpoints that survive a kill at any moment, and a Ctrl-C that loses nothing."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

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


class Checkpoint(ModelCheckpoint):
    """A checkpoint every k optimiser steps, ``last.ckpt`` with each of them and at the end of the run.

    Args:
        dirpath: where to.
        every_n_steps: optimiser steps between two checkpoints.
        keep_all: keep every one; otherwise the newest and ``last.ckpt``.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 10_000, keep_all: bool = True) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            save_last=True,
            save_top_k=-1 if keep_all else 1,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final step too, wherever it falls. Later than here the average has replaced the raw weights."""
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the current step unless that has been done."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class StopOnInterrupt(Callback):
    """On Ctrl-C finish the step, save, and say how to resume; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the interrupt signal."""
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)
        rank_zero_info("\nInterrupted: finishing this step and saving. Press Ctrl-C again to stop at once.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the border of an optimiser step; the end of the loop saves."""
        if self.interrupted and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
