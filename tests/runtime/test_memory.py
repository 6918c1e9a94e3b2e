"""The process keeps its memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from dcdit.runtime.memory import configure_memory

configure_memory()
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


GROWTH = """
import sys
from pathlib import Path
import torch
from dcdit.runtime.memory import configure_memory

if sys.argv[1] == "configured":
    configure_memory()
linears = [torch.nn.Linear(64, 64) for _ in range(4)]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


for length in range(100, 500):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.ones(length, 64)
        for linear in linears:
            x = linear(x)
    if length == 150:
        before = resident()
    x.sum().backward()
print(resident() - before)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc tells the memory of a process")
def test_kernels_of_lengths_that_do_not_come_again_are_forgotten():
    grown = {}
    for how in ("plain", "configured"):
        done = subprocess.run([sys.executable, "-c", GROWTH, how], capture_output=True, text=True, check=True)
        grown[how] = float(done.stdout)
    print(grown)
    assert grown["configured"] < max(40, grown["plain"] / 2)  # MiB
