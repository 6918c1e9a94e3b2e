"""The speed of training."""

import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dcdit.data.stream import Batch


def logging_interval(trainer: pl.Trainer) -> int:
    """The number of optimiser steps from one logged step to the next."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector


class Throughput(Callback):
    """Logs ``train/images_per_s`` over all ranks between two logged steps."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock at the first step."""
        self._since = (time.perf_counter(), trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock, for validation does not count."""
        self._since = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        if self._since is None or trainer.global_step % logging_interval(trainer):
            return
        now, step = time.perf_counter(), trainer.global_step
        start, start_step = self._since
        if step > start_step:
            images = (step - start_step) * trainer.accumulate_grad_batches * trainer.world_size * len(batch[0])
            pl_module.log("train/images_per_s", images / (now - start))
            corrupt = getattr(trainer.datamodule, "corrupt", ())  # type: ignore[attr-defined]  # set by fit
            if corrupt:
                pl_module.log("train/corrupt_samples", float(len(corrupt)))
            self._since = (now, step)
