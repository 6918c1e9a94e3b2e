"""The signals after which training saves and stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""After which training saves and stops: Ctrl-C, the end of a process, a terminal or a job, and what schedulers send
before that end."""

_shields = 0
_interrupted = False


def ignore_interrupts(worker: int) -> None:
    """For the workers of a loader: terminals and SLURM signal all processes, but only the main one decides."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def interrupt() -> None:
    """End the program as Ctrl-C does; within :func:`shielded` as soon as that is over."""
    global _interrupted
    if _shields:
        _interrupted = True
    else:
        raise KeyboardInterrupt


@contextmanager
def shielded() -> Iterator[None]:
    """What is done here is not torn by :func:`interrupt`."""
    global _shields, _interrupted
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if _interrupted and not _shields:
            _interrupted = False
            raise KeyboardInterrupt
