"""How fast training runs."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def logging_interval(trainer: pl.Trainer) -> int:
    """Optimiser steps between two logged ones."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector


class Throughput(Callback):
    """Logs ``train/images_per_s`` over all ranks between two logged steps."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock: validation is no training time."""
        self._since = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        if self._since is None or trainer.global_step % logging_interval(trainer):
            return
        now, step = time.perf_counter(), trainer.global_step
        before, first = self._since
        if step > first:
            images = (step - first) * trainer.accumulate_grad_batches * trainer.world_size * len(batch[0])
            rate = images / (now - before)
            pl_module.log("train/images_per_s", rate)
            corrupt = getattr(trainer.datamodule, "corrupt", ())  # type: ignore[attr-defined]  # set by fit
            if corrupt:
                pl_module.log("train/corrupt_samples", float(len(corrupt)))
            self._since = (now, step)
