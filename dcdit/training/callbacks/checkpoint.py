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
from dcdit.runs.resume import LAST, checkpoint_name, checkpoints_in
from dcdit.runtime.files import UnwritableError, describe_write_error, replacing
from dcdit.runtime.processes import say
from dcdit.runtime.signals import shielded


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes whole checkpoints or none; hands over the one that a run goes on from, which was read and checked before.

    Args:
        opened: that checkpoint's content; None if the run begins.
    """

    def __init__(self, opened: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._opened = opened

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace ``path`` by ``checkpoint`` at once or not at all; UserError if the disk does not take it."""
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (UnwritableError, OSError) as error:
            words = describe_write_error(target, error) if isinstance(error, OSError) else str(error)
            raise UserError(f"{words}; earlier checkpoints are whole: resume with ckpt_path=last") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The checkpoint that was opened; its memory is given back with Lightning's own reference."""
        assert self._opened is not None
        opened, self._opened = self._opened, None
        return {**opened, "pytorch-lightning_version": pl.__version__}  # ours: there is nothing to migrate


@checked
class Checkpoint(callbacks.Checkpoint):
    """A checkpoint every k optimiser steps and at the end of the run; ``last.ckpt`` is the newest of them.

    It is written when all that its step logs is written; one more before every validation. While steps are skipped,
    because their gradients are not finite, or weights are not, none is written: every checkpoint is one to go on from.

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
        """Where a run begins or goes on there is nothing to save.

        Where it goes on from an earlier step than its newest, later checkpoints are of steps that will be done anew:
        they stay under other names, for a resume takes the newest of its kind.
        """
        self._saved = step = trainer.global_step
        later = [path for other, path in self._steps().items() if other > step]
        if later and trainer.is_global_zero:
            for path in later:
                path.replace(path.with_name(f"abandoned_{path.name}"))
            current = self.folder / checkpoint_name(step)
            for name in (current, self.folder / LAST):
                link(Path(str(trainer.ckpt_path)), name)
            names = ", ".join(path.name for path in later)
            say(f"Later checkpoints than step {step} are kept as abandoned_*.ckpt in {self.folder}: {names}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save the step before, if it is one of every k."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save first: a validation may take long or fail, and whoever stops the run need not wait for it."""
        self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final step too, wherever it falls. Later than here the average has replaced the raw weights."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current step unless that has been done or must not be, and drop what need not stay."""
        step = trainer.global_step
        if step == self._saved or trainer.sanity_checking:
            return
        self._saved = step
        ailment = trainer.lightning_module.ailment
        if ailment:
            say(f"No checkpoint of step {step}. {ailment}")
            return
        with shielded():
            path = self.folder / checkpoint_name(step)
            trainer.save_checkpoint(path, weights_only=False)  # all of it: moments and position too
            if trainer.is_global_zero:
                link(path, self.folder / LAST)
                self._prune()

    def protect(self, name: str) -> Path | None:
        """Keep the newest checkpoint under ``name``, which is not pruned; None if there is none."""
        newest = next(iter(self._steps().values()), None)
        if newest is None:
            return None
        link(newest, self.folder / name)
        return self.folder / name

    def _steps(self) -> dict[int, Path]:
        return checkpoints_in(self.folder)

    def _prune(self) -> None:
        if self.keep is not None:
            for step, path in list(self._steps().items())[self.keep :]:
                if self.milestone_every is None or step % self.milestone_every:
                    path.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Make ``name`` another name of the file ``path``, at once; a copy where the file system has no links."""
    draft = name.with_name(f".{name.name}.link")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:
        with replacing(draft) as target, path.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 22)
    draft.replace(name)
    draft.unlink(missing_ok=True)  # to rename one name of a file to another of its names does nothing
