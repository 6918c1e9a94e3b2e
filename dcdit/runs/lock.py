"""The lock of a run's directory: only one run writes to it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dcdit.errors import UserError
from dcdit.runs.state import RunState
from dcdit.runtime.files import open_regular

LOCK = ".running.lock"


@contextmanager
def sole_writer(run_dir: Path, rank: int, patience: float = 0) -> Iterator[None]:
    """Lock a run's directory for this run; the kernel releases the lock however the process ends.

    Args:
        rank: of this process; only the first takes the lock, for all.
        patience: seconds to wait for a process that is about to end.

    Raises:
        UserError: if another process trains there.
    """
    if rank:
        yield
        return
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=max(patience, 0.5))  # `is_held` takes it for a moment
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
    except OSError as error:
        raise UserError(f"{run_dir / LOCK} cannot be locked ({error.strerror}): remove it") from error
    except NotImplementedError:
        pass  # a file system without locks; to release the lock below then does nothing
    try:
        yield
    finally:
        lock.release()


def is_held(run_dir: Path) -> bool:
    """Whether a process trains in ``run_dir`` right now; writes nothing, for the directory may be another user's."""
    try:
        with open_regular(run_dir / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UserError):  # no lock, or a file system without locks
        return False
    return False
