"""Checkpoints that survive a kill at any moment."""

import math
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
from dcdit.training.callbacks.best import BEST, BestCheckpoint, best_checkpoints, metric_to_watch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes whole checkpoints or none, and returns the checkpoint that a run goes on from, which is read before.

    Args:
        opened: the content of that checkpoint, checked; None if the run begins.
    """

    def __init__(self, opened: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._opened = opened

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write ``checkpoint`` to ``path``, completely or not at all; UserError if the disk does not take it."""
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (UnwritableError, OSError) as error:
            reason = describe_write_error(target, error) if isinstance(error, OSError) else str(error)
            raise UserError(f"{reason}; earlier checkpoints are whole: resume with ckpt_path=last") from error

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return the opened checkpoint, and keep no reference: Lightning frees its memory."""
        assert self._opened is not None
        opened, self._opened = self._opened, None
        return {**opened, "pytorch-lightning_version": pl.__version__}  # so that Lightning migrates nothing


@checked
class Checkpoint(callbacks.Checkpoint):
    """A checkpoint every k optimiser steps and at the end of the run; ``last.ckpt`` is the newest of them.

    A checkpoint is written when everything that its step logs is written, and before every validation as well. None is
    written while weights are not finite, or steps are skipped because their gradients are not: a run can go on from
    every checkpoint.

    Args:
        every_n_steps: optimiser steps between two checkpoints.
        keep: how many of the newest are kept; None keeps all.
        milestone_every: checkpoints whose step is a multiple of this are kept as well; None for none.
        best: a metric of the validations; the checkpoint where it was best stays as ``best.ckpt``, and under a name
            that says metric, value and step. None for none.

    Raises:
        UserError: if a number is not positive.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_steps: Count,
        keep: Count | None,
        milestone_every: Count | None,
        best: str | None,
    ) -> None:
        self.folder, self.every_n_steps = Path(dirpath), every_n_steps
        self.keep, self.milestone_every, self.best = keep, milestone_every, best
        self._saved = -1

    def check_best(self, trainer: pl.Trainer, validates: bool) -> None:
        """Find the metric that ``best`` names; UserError if no validation will log it."""
        if self.best is not None:
            self.best = metric_to_watch(self.best, trainer.callbacks, validates)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step at which the run begins or goes on, which need not be saved again.

        If the run goes on from an earlier checkpoint than its newest, the later ones are of steps that will be done
        again. They are renamed, for a resume takes the newest checkpoint.
        """
        self._saved = step = trainer.global_step
        later = [path for other, path in checkpoints_in(self.folder).items() if other > step]
        if later and trainer.is_global_zero:
            for path in later:
                path.replace(path.with_name(f"abandoned_{path.name}"))
            current = self.folder / checkpoint_name(step)
            for name in (current, self.folder / LAST):
                link(Path(str(trainer.ckpt_path)), name)
            names = ", ".join(path.name for path in later)
            say(f"Later checkpoints than step {step} are kept as abandoned_*.ckpt in {self.folder}: {names}")
        if trainer.is_global_zero:
            self._restore_best(step)

    def _restore_best(self, step: int) -> None:
        """Have ``best.ckpt`` be the best of the steps that are done; one of later steps is renamed."""
        for path, best in best_checkpoints(self.folder).items():
            if best.step > step:
                path.replace(path.with_name(f"abandoned_{path.name}"))
                (self.folder / BEST).unlink(missing_ok=True)
        for best in best_checkpoints(self.folder).values():
            self._keep_best(best, self.folder / best.name)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Save the last step if it is a multiple of ``every_n_steps``."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before a validation, which may take long or fail."""
        self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the checkpoint of this validation, which was written before it, if it is the best so far."""
        logged = trainer.callback_metrics.get(self.best or "")
        if logged is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        best = BestCheckpoint.of(str(self.best), float(logged), trainer.global_step)
        path = self.folder / checkpoint_name(best.step)
        if path.exists() and self._keep_best(best, path):
            where = os.path.relpath(self.folder / BEST)
            say(f"Step {best.step}: {self.best} {best.value:.4g} is the best so far, kept as {where}")

    def _keep_best(self, best: BestCheckpoint, path: Path) -> bool:
        """Keep the checkpoint ``path`` in place of those before, and return True, unless one of them is as good."""
        others = {file: other for file, other in best_checkpoints(self.folder).items() if other.name != best.name}
        rivals = [other for other in others.values() if other.metric == best.metric]
        if not all(other.is_worse_than(best.value) for other in rivals) or not math.isfinite(best.value):
            return False
        with shielded():
            if path.name != best.name:
                link(path, self.folder / best.name)
            link(path, self.folder / BEST)
            for file in others:
                file.unlink(missing_ok=True)
        return True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final step, here because the EMA replaces the raw weights right after."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current step, unless it is saved already or cannot be gone on from, and delete old checkpoints."""
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
            trainer.save_checkpoint(path, weights_only=False)  # with the optimiser's moments and the position
            if trainer.is_global_zero:
                link(path, self.folder / LAST)
                self._prune()

    def protect(self, name: str) -> Path | None:
        """Keep the newest checkpoint under ``name``, which is never deleted; None if there is no checkpoint."""
        newest = next(iter(checkpoints_in(self.folder).values()), None)
        if newest is None:
            return None
        link(newest, self.folder / name)
        return self.folder / name

    def _prune(self) -> None:
        if self.keep is not None:
            for step, path in list(checkpoints_in(self.folder).items())[self.keep :]:
                if self.milestone_every is None or step % self.milestone_every:
                    path.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Make ``name`` a hard link to the file ``path``, at once; a copy if the file system has no links."""
    draft = name.with_name(f".{name.name}.link")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:
        with replacing(draft) as target, path.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 22)
    draft.replace(name)
    draft.unlink(missing_ok=True)  # still there if both were names of one file: then the rename does nothing
