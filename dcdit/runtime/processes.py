"""Who else computes: the rank of this process, how many there are, and what only the first of them says."""

import logging
import os
import re
from dataclasses import dataclass

log = logging.getLogger("dcdit")
log.setLevel(logging.INFO)

_LOST = re.compile(
    "connection.*(closed|reset|refused)|time(d )?out|broken pipe|remote (error|process)|unhandled system error"
)


@dataclass(frozen=True)
class Launch:
    """How this process was started as one of several.

    Attributes:
        by: ``torchrun`` or ``srun``.
        rank, world_size: this process among all.
        local_rank, local_size: this process among those of its machine.
    """

    by: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int


def launched() -> Launch | None:
    """Whoever started this process as one of several; None if it was started alone."""
    found = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Launch("torchrun", *(int(found(name, "0")) for name in names))
    # sbatch alone sets the number of tasks too, but starts the script once
    interactive = found("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_NTASKS" in os.environ and not interactive:
        each = found("SLURM_NTASKS_PER_NODE", "")
        local = int(each) if each.isdigit() else 1
        rank, world, own = (int(found(f"SLURM_{name}", "0")) for name in ("PROCID", "NTASKS", "LOCALID"))
        return Launch("srun", rank, world, own, local)
    return None


def processes() -> tuple[int, int]:
    """Rank of this process, and how many there are; (0, 1) if it was started alone."""
    launch = launched()
    return (launch.rank, launch.world_size) if launch else (0, 1)


def rank() -> int:
    """Of this process in training, whoever starts the others, Lightning included; known before there is a trainer."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def local_rank() -> int:
    """This process among those of its machine."""
    launch = launched()
    return launch.local_rank if launch else 0


def local_processes() -> int:
    """How many processes were started on this machine."""
    launch = launched()
    return max(1, launch.local_size) if launch else 1


def say(message: str) -> None:
    """Tell the user, once for all processes."""
    if not rank():
        log.info(message)


def print_once(message: str) -> None:
    """Print ``message`` as a result of the command, once for all processes."""
    if not rank():
        print(message)


def lost_process(error: BaseException) -> bool:
    """Whether ``error`` only says that another process of the run is gone; the reason, if any, is with that one."""
    text = str(error).lower()
    between = type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    return between and isinstance(error, RuntimeError) and _LOST.search(text) is not None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
