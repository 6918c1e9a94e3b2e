"""The signals after which training saves and stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Ctrl-C, the requests to end a process or terminal, and the signals that schedulers send before a job ends."""

_shields = 0
_interrupted = False


def ignore_interrupts(worker: int) -> None:
    """Ignore signals in a loader's worker: terminals and SLURM signal all processes, but only the main one decides."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def interrupt() -> None:
    """End the program as Ctrl-C does; within :func:`shielded` at the end of its block."""
    global _interrupted
    if _shields:
        _interrupted = True
    else:
        raise KeyboardInterrupt


@contextmanager
def shielded() -> Iterator[None]:
    """Delay :func:`interrupt` until the block has ended."""
    global _shields, _interrupted
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if _interrupted and not _shields:
            _interrupted = False
            raise KeyboardInterrupt
