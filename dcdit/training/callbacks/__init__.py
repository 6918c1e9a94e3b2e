"""Lightning callbacks: checkpoints, averages of weights, signals, warnings and the progress bar."""

from dcdit.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from dcdit.training.callbacks.ema import EMA
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.callbacks.monitoring import LossWatch, ProgressBar, Throughput
from dcdit.training.callbacks.power_ema import PowerEMA

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
