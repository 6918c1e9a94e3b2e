"""Lightning callbacks: checkpoints, averages of weights, signals, warnings and the progress bar."""

from dcdit.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from dcdit.training.callbacks.ema import EMA
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.callbacks.loss_watch import LossWatch
from dcdit.training.callbacks.power_ema import PowerEMA
from dcdit.training.callbacks.progress_bar import ProgressBar
from dcdit.training.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "Checkpoint",
    "LossWatch",
    "PowerEMA",
    "ProgressBar",
    "StopOnInterrupt",
    "Throughput",
]
