"""Who else computes: the rank of this process, and how many there are."""

import os
import re

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

_LOST = re.compile(
    "connection.*(closed|reset|refused)|time(d )?out|broken pipe|remote (error|process)|unhandled system error"
)


def launcher() -> ClusterEnvironment | None:
    """Whoever started this process as one of several: torchrun or srun. Queueing again is not Lightning's business."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # sbatch alone sets the number of tasks too, but starts the script once
    if SLURMEnvironment.detect() and "SLURM_STEP_NUM_TASKS" in os.environ:
        return SLURMEnvironment(auto_requeue=False)
    return None


def local_rank() -> int:
    """This process among those of its machine."""
    started_by = launcher()
    return started_by.local_rank() if started_by else 0


def processes() -> tuple[int, int]:
    """Rank of this process, and how many there are; (0, 1) if it was started alone."""
    started_by = launcher()
    return (started_by.global_rank(), started_by.world_size()) if started_by else (0, 1)


def rank() -> int:
    """Of this process in training, whoever starts the others; known before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def local_processes() -> int:
    """How many processes were started on this machine."""
    for variable in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if launcher() and os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 1


def lost_process(error: BaseException) -> bool:
    """Whether ``error`` only says that another process of the run is gone; the reason, if any, is with that one."""
    text = str(error).lower()
    between = isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text
    return between and isinstance(error, RuntimeError) and _LOST.search(text) is not None
