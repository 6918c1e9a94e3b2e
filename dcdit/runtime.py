"""The process and its machine: rank, device, precision, memory, and what tells one set of weights from another."""

import hashlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from dcdit.errors import UserError

_LOST = re.compile(
    "connection.*(closed|reset|refused)|time(d )?out|broken pipe|remote (error|process)|unhandled system error"
)

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name))
"""After which training saves and stops: Ctrl-C, the end of a process or a job, and what SLURM sends before that end."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to ``bf16`` or ``fp16``; nothing for ``fp32``."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=types[precision]) if precision in types else nullcontext()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with ``number`` threads on the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes a GPU where there is one, this process's own of several.

    Raises:
        UserError: if it is not there.
    """
    if name == "auto":
        name = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} is not usable here: {str(error).splitlines()[0]}") from None


def device_words(device: torch.device) -> str:
    """What computes, for people who compare timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


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


def fingerprint(module: torch.nn.Module) -> str:
    """Digest of a module's weights, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def ignore_interrupts(worker: int) -> None:
    """For the workers of a loader: terminals and SLURM signal all processes, but only the main one decides."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def lost_process(error: BaseException) -> bool:
    """Whether ``error`` only says that another process of the run is gone; the reason, if any, is with that one."""
    text = str(error).lower()
    between = isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text
    return between and isinstance(error, RuntimeError) and _LOST.search(text) is not None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
