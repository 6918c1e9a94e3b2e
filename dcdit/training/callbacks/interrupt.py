"""Signals end a run without loss: it finishes the step and saves."""

import signal
from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dcdit.runs.state import State
from dcdit.runtime.processes import say
from dcdit.runtime.signals import STOP_SIGNALS, interrupt


class StopOnInterrupt(Callback):
    """On Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 finish the step, save, and say how to resume.

    A second Ctrl-C stops at once, but lets a checkpoint that is being written be finished. A validation runs only if it
    is due, and after the checkpoint.

    Several processes agree every few steps, for a signal may reach only some of them, or in different steps.
    """

    AGREE_EVERY = 5
    """Optimiser steps between two agreements of several processes."""

    def __init__(self) -> None:
        self.signalled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install handlers, after Lightning, whose own handler of SIGTERM stops without saving.

        Lightning restores all handlers of before when training ends, however it ends.
        """
        for signum in STOP_SIGNALS:
            # Ignored signals stay ignored: a run that was started with nohup shall outlive its terminal.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signalled:
            interrupt()
        if self.signalled:
            return  # SLURM sends several, one after the other
        self.signalled = True
        hint = "Press Ctrl-C again to stop at once." if signum == signal.SIGINT else ""
        say(f"\n{signal.Signals(signum).name}: finishing this step and saving. {hint}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stop after an optimiser step; the end of the loop saves."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1:
            if trainer.global_step % self.AGREE_EVERY:
                return
            self.signalled = trainer.strategy.reduce_boolean_decision(self.signalled, all=False)
        if self.signalled:
            trainer.should_stop = True
            every = trainer.val_check_batch
            if not isinstance(every, int) or (batch_idx + 1) % every:  # Lightning would validate before it stops
                trainer.limit_val_batches = 0

    def outcome(self, trainer: pl.Trainer) -> State:
        """How training ended; a signal that came in the last step interrupted nothing."""
        stopped = self.signalled and trainer.global_step < trainer.max_steps
        return State.INTERRUPTED if stopped else State.FINISHED
