"""Memory that training frees stays with the process, and the highest is reported."""

import subprocess
import sys

import pytest

_RESIDENT = """
import resource, sys, torch
torch.set_num_threads(1)  # Linux counts the pages of each processor with some slack
from layerskip.model.hardware import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
block = torch.ones(64 * 2**18)
assert resident() - before > 60
del block
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_blocks_stay_with_the_process(kept):
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, "keep" if kept else "leave"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (int(done.stdout) > 50) == kept


_HIGHEST = """
import torch
torch.set_num_threads(1)
from layerskip.model.hardware import peak_memory_bytes

cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
block = torch.ones(before // 4 + 2**24)
highest = peak_memory_bytes(cpu)
del block
print(before, highest, peak_memory_bytes(cpu))
"""


def test_the_highest_memory_counts():
    done = subprocess.run(
        [sys.executable, "-c", _HIGHEST], capture_output=True, text=True, check=True
    )
    before, highest, after = map(int, done.stdout.split())
    assert highest >= before + 50 * 2**20
    assert after >= highest - 2**22  # Linux counts a process's pages with some slack
