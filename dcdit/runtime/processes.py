"""The processes of a run: the rank of this one, how many there are, and messages that only the first prints."""

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
    """How this process was started.

    Attributes:
        by: ``torchrun`` or ``srun``; empty if it was started alone.
        rank, world_size: this process among all.
        local_rank, local_size: this process among those of its machine.
    """

    by: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launch:
    """How this process was started: alone, or as one of several."""
    variable = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Launch("torchrun", *(int(variable(name, "0")) for name in names))
    # sbatch alone sets the number of tasks too, but starts the script once
    interactive = variable("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_NTASKS" in os.environ and not interactive:
        tasks = variable("SLURM_NTASKS_PER_NODE", "")
        local_size = int(tasks) if tasks.isdigit() else 1
        rank, size, local_rank = (int(variable(f"SLURM_{name}", "0")) for name in ("PROCID", "NTASKS", "LOCALID"))
        return Launch("srun", rank, size, local_rank, local_size)
    return Launch()


def processes() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) if it was started alone."""
    launch = launched()
    return launch.rank, launch.world_size


def rank() -> int:
    """The rank of this process in training, even if Lightning starts the others; known before there is a trainer."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def say(message: str) -> None:
    """Log a message for the user, once for all processes."""
    if not rank():
        log.info(message)


def print_once(message: str) -> None:
    """Print ``message`` as a result of the command, once for all processes."""
    if not rank():
        print(message)


def lost_process(error: BaseException) -> bool:
    """Whether ``error`` only says that another process of the run died; that process then has the reason."""
    text = str(error).lower()
    between = type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    return between and isinstance(error, RuntimeError) and _LOST.search(text) is not None


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
