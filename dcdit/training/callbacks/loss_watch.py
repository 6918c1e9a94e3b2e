"""A warning when the loss explodes while it is still finite."""

from collections import deque
from statistics import median
from typing import Annotated

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dcdit.checks import Bounds, Count, checked
from dcdit.runtime.processes import say
from dcdit.training.callbacks.checkpoint import Checkpoint
from dcdit.training.callbacks.throughput import logging_interval

Factor = Annotated[float, Bounds(1, 10**7, open_low=True, hint="5 warns when the loss is five times the usual one")]


@checked
class LossWatch(Callback):
    """Warns when the logged loss is far above its running median, and keeps the newest checkpoint from before.

    The checkpoint is kept as ``before_step_*.ckpt``. There is one warning each time the loss leaves its range.

    Args:
        factor: a loss above this multiple of the median is far.
        window: logged losses of which the median is taken; the first so many are not judged.

    Raises:
        UserError: if a number is out of range.
    """

    def __init__(self, factor: Factor, window: Count) -> None:
        self.factor, self.window = factor, window
        self._seen: deque[float] = deque(maxlen=window)
        self._far = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare the loss with the median when it is logged."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step % logging_interval(trainer):
            return
        loss = float(trainer.callback_metrics["train/loss"])
        usual = median(self._seen) if len(self._seen) == self.window else None
        far = usual is not None and not loss <= self.factor * usual
        if far and not self._far:
            self._warn(trainer, loss, usual)
        self._far = far
        if not far:
            self._seen.append(loss)

    def _warn(self, trainer: pl.Trainer, loss: float, usual: float | None) -> None:
        kept = None
        if trainer.is_global_zero:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoint):
                    kept = callback.protect(f"before_step_{trainer.global_step:08d}.ckpt")
        where = f"The newest checkpoint from before stays as {kept}." if kept else "There is no checkpoint before it."
        say(
            f"Step {trainer.global_step}: the loss is {loss:.4g}, its median of {self.window} logged ones {usual:.4g}."
            f" {where} If it does not come back, go on from there with ckpt_path=... and a lower optimizer.lr"
        )
