"""One writer for each run's directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dcdit.errors import UserError
from dcdit.runs.state import RunState

LOCK = ".running.lock"


@contextmanager
def sole_writer(run_dir: Path, rank: int, patience: float = 0) -> Iterator[None]:
    """Hold a run's directory; the kernel gives it back however the process ends.

    Args:
        run_dir: the directory.
        rank: of this process; the first holds it for all.
        patience: seconds to wait for one that is about to end.

    Raises:
        UserError: if another run does.
    """
    if rank:
        yield
        return
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=max(patience, 0.5))  # whoever asks `is_held` has it for a moment
    except Timeout:
        try:
            holder = RunState.read(run_dir)
        except UserError:
            holder = None
        where = f" on {holder.host}" if holder and holder.host != socket.gethostname() else ""
        raise UserError(
            f"run_dir={os.path.relpath(run_dir)}: another process{where} is training there; wait for it, or start this"
            " one with another run_name=..."
        ) from None
    except NotImplementedError:
        pass  # a file system without locks, where nobody can tell; to release below does nothing then
    try:
        yield
    finally:
        lock.release()


def is_held(run_dir: Path) -> bool:
    """Whether a process trains in ``run_dir`` right now. Reads only: the directory may be somebody else's."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, where nobody can tell
        return False
    finally:
        os.close(descriptor)
