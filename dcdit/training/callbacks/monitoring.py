"""What is watched during training: the speed, the loss, and the progress bar."""

import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich import get_console

from dcdit.checks import Bounds, Count, checked
from dcdit.data.stream import Batch
from dcdit.runtime.display import Console
from dcdit.runtime.memory import peak_memory
from dcdit.runtime.processes import say
from dcdit.training.callbacks.checkpoint import Checkpoint


def logging_interval(trainer: pl.Trainer) -> int:
    """The number of optimiser steps from one logged step to the next."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector


class Throughput(Callback):
    """Logs ``train/images_per_s`` over all ranks and ``train/peak_memory_gb`` between two logged steps.

    The memory is what tensors held on the GPU of this process; on a CPU it is that of the process since its start.
    """

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
            pl_module.log("train/peak_memory_gb", peak_memory(pl_module.device) / 1e9)
            corrupt = getattr(trainer.datamodule, "corrupt", ())  # type: ignore[attr-defined]  # set by fit
            if corrupt:
                pl_module.log("train/corrupt_samples", float(len(corrupt)))
            self._since = (now, step)


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


@checked
class ProgressBar(RichProgressBar):
    """Lightning's progress bar over the steps of the whole run; there are no epochs to count.

    Args:
        refresh_rate: steps between two refreshes; each one reads the loss from the device.
    """

    SHOWN: ClassVar[Mapping[str, str]] = {"loss": "train/loss", "images/s": "train/images_per_s"}

    def __init__(self, refresh_rate: Count) -> None:
        super().__init__(refresh_rate=refresh_rate)
        get_console().__class__ = Console  # Lightning's bar is shown on Rich's global console
        self._shown: dict[str, float] = {}

    @property
    def total_train_batches(self) -> int | float:
        """The micro-batches of the whole run; a resumed run goes on counting from where it stopped."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        parts = self.trainer.accumulate_grad_batches
        return "training" if parts == 1 else f"training, micro-batches ({parts} a step)"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics at the last refresh; Lightning would read its own from the device at every step."""
        if trainer.global_step % self.refresh_rate == 0:
            metrics = trainer.callback_metrics
            self._shown = {name: float(metrics[key]) for name, key in self.SHOWN.items() if key in metrics}
        return self._shown
