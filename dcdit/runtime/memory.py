"""How much memory is free, and how the process reuses what it frees."""

import ctypes
import ctypes.util
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_INFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def free_memory() -> int | None:
    """The most bytes that this process can have: the free memory, or its container's limit; None if unknown."""
    limits = []
    with suppress(OSError):
        if available := re.search(r"MemAvailable: *(\d+) kB", _INFO.read_text()):
            limits.append(int(available[1]) * 1024)
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # without a limit the file says "max"
            limits.append(int(path.read_text()))
    return min(limits, default=None)


_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Limits of the CPU kernels that oneDNN, and torch in front of it, keep for shapes that they have met; 1024 each by
default."""


def configure_memory() -> None:
    """Have a process hold no more memory than it needs, and reuse what it frees. Call it before the first computation.

    glibc shall reuse freed memory instead of returning it to the kernel. Activations are otherwise mapped and unmapped
    at every operation, and each fresh page costs a fault: element-wise operations of a small DC-DiT ran up to five
    times slower, a training step of DC-DiT-B at 512px a tenth longer.

    oneDNN shall forget kernels early. Packed sequences have another length at every step, so kernels for a length are
    hardly ever met again; in bfloat16 those of ``experiment=digits`` took 0.9 GB after 150 steps.
    """
    for name, limit in _KERNEL_CACHES.items():
        os.environ.setdefault(name, limit)  # read at the first computation
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Set glibc's allocator so; does nothing elsewhere."""
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # not even those above the 32 MiB that M_MMAP_THRESHOLD may be set to
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: "torch.device") -> int:
    """The most bytes held at once: of tensors on a GPU since the last call, elsewhere of the process since it began."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
