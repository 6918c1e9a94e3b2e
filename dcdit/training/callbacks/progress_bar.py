"""The progress bar of training."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from dcdit.checks import Count, checked
from dcdit.runtime.display import Console


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
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics at the last refresh; Lightning would read its own from the device at every step."""
        if trainer.global_step % self.refresh_rate == 0:
            metrics = trainer.callback_metrics
            self._shown = {name: float(metrics[key]) for name, key in self.SHOWN.items() if key in metrics}
        return self._shown
