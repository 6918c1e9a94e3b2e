"""How far training is, in a terminal."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from dcdit.checks import Count, checked


@checked
class ProgressBar(RichProgressBar):
    """Lightning's progress bar over the steps of the whole run; there are no epochs to count.

    Args:
        refresh_rate: steps between two refreshes; each one reads the loss from the device.
    """

    def __init__(self, refresh_rate: Count) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of the whole run; a resumed run counts on from where it stopped."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics shown, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
