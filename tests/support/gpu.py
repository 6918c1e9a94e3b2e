"""What the host reads from a real GPU; of a pretended one, see ``pretend_cuda``."""

import warnings
from collections.abc import Callable

import torch


def reads_of(part: Callable[[], object]) -> list[str]:
    """The files and lines at which the host waits for the GPU while ``part`` runs."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            part()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
