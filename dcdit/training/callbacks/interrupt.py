"""A Ctrl-C, or the end of a job, that loses nothing."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dcdit.runs.state import State
from dcdit.runtime.processes import say
from dcdit.runtime.signals import STOP_SIGNALS, interrupt


class StopOnInterrupt(Callback):
    """On Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 finish the step, save, and say how to resume.

    A second Ctrl-C stops at once, but does not tear a checkpoint that is being written. A validation that is not due is
    not run; one that is, after the checkpoint.

    Several processes agree every few steps, for the signal need not reach all of them, nor in the same step.
    """

    TOGETHER = 5
    """Optimiser steps between two agreements of several processes."""

    def __init__(self) -> None:
        self.signalled = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, after Lightning, whose own handler of SIGTERM stops without saving."""
        # Who started this with nohup wants it to outlive the terminal.
        ignored = {each for each in STOP_SIGNALS if signal.getsignal(each) is signal.SIG_IGN}
        self._previous = {each: signal.signal(each, self._handle) for each in STOP_SIGNALS if each not in ignored}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signalled:
            interrupt()
        if self.signalled:
            return  # SLURM sends several, one after the other
        self.signalled = True
        again = "Press Ctrl-C again to stop at once." if signum == signal.SIGINT else ""
        say(f"\n{signal.Signals(signum).name}: finishing this step and saving. {again}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the border of an optimiser step; the end of the loop saves."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1:
            if trainer.global_step % self.TOGETHER:
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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        self._previous = {}
