"""Memory that training frees stays with the process, and the peak is reported."""

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
torch.set_num_threads(1)  # Linux counts the pages of each CPU with some slack
from layerskip.model.hardware import keep_freed_memory, peak_memory_bytes

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

cpu = torch.device("cpu")
for keep in (False, True):
    if keep:
        keep_freed_memory()
    before = resident()
    block = torch.ones(peak_memory_bytes(cpu) // 4)
    allocated = resident() - before
    peak = peak_memory_bytes(cpu)
    del block
    print(allocated, resident() - before, peak - before, peak_memory_bytes(cpu) - peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_the_peak_is_reported():
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, is_kept in zip(done.stdout.splitlines(), (False, True), strict=True):
        allocated, left, peak, change = map(int, line.split())
        assert (left > 0.8 * allocated) == is_kept
        assert peak >= 0.9 * allocated > 50 * 2**20
        assert change >= -(2**22)
