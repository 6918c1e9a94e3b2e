"""EMA weights: the exponential moving average of the weights."""

from typing import Annotated

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dcdit.checks import Bounds, checked

Decay = Annotated[float, Bounds(0, 1, open_high=True, hint="take 0.9999 for long runs, 0.99 for very short ones")]


@checked
class EMA(WeightAveraging):
    """Lightning's weight averaging with the fused update over all tensors at once.

    In checkpoints ``state_dict`` holds the EMA weights and ``current_model_state`` the raw weights; validation runs on
    the EMA weights.

    The average is Lightning's private ``_average_model``. If a release of Lightning renames it, every run with an EMA
    ends in an AttributeError when fitting begins.

    Args:
        decay: weight of the old average at every optimiser step, 0.9999 as published.
        warmup: take (1 + n) / (10 + n) at step n as long as that is less than ``decay``: the average is then over the
            last tenth of the steps done.

    Raises:
        UserError: if ``decay`` is outside [0, 1).
    """

    def __init__(self, decay: Decay, warmup: bool) -> None:
        def update(average: list[Tensor], current: list[Tensor], count: int | Tensor) -> None:
            done = int(count)
            now = min(decay, (1 + done) / (10 + done)) if warmup else decay
            get_ema_multi_avg_fn(now)(average, current, count)

        self.settings = {"decay": decay, "warmup": warmup}
        # Buffers are constant tables: nothing to average.
        super().__init__(use_buffers=False, multi_avg_fn=update)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the average when fitting begins, and record its settings in checkpoints."""
        super().setup(trainer, pl_module, stage)
        pl_module.hparams["ema"] = self.settings
        if self._average_model is not None:
            # The update asks this counter whether it is zero: on the host that costs no synchronisation.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            # The copy computes no loss: with the list, a teacher would stay in memory after its distillation.
            self._average_model.module.auxiliary = []  # type: ignore[assignment]  # no tensor, no module

    def average_tensors(self) -> list[Tensor]:
        """The tensors of the averaged weights."""
        return list(self._average_model.parameters()) if self._average_model is not None else []
