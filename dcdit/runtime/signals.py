"""The signals after which training saves and stops."""

import signal

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name))
"""After which training saves and stops: Ctrl-C, the end of a process or a job, and what SLURM sends before that end."""


def ignore_interrupts(worker: int) -> None:
    """For the workers of a loader: terminals and SLURM signal all processes, but only the main one decides."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
