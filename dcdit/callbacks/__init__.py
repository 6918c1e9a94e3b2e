"""Lightning callbacks: what happens around training, beside the maths."""

from dcdit.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint, StopOnInterrupt
from dcdit.callbacks.ema import EMA
from dcdit.callbacks.throughput import Progress, Throughput

__all__ = ["EMA", "AtomicCheckpointIO", "Checkpoint", "Progress", "StopOnInterrupt", "Throughput"]
