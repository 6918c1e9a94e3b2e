"""The process keeps its memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from dcdit.runtime.memory import keep_freed_memory

keep_freed_memory()
for _ in range(12):  # the last one counts: by then the heap has found its size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 * 2**20)  # 64 MiB, above the largest M_MMAP_THRESHOLD
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_large_activations_reuse_the_pages_of_freed_ones():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 4 x 16384 pages are fresh otherwise
