"""How much memory training took, and keeping it once it is there."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

# Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on a GPU, resident in the process on a CPU; 0 = unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux, where ru_maxrss begins with the peak of who started this process.
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have this process reuse the large blocks that it frees, instead of returning them.

    glibc gives each large block back to the system and takes it anew, whose pages then have to be
    zeroed: on a CPU that was half the time of a training step. Other C libraries are left as they
    are.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
