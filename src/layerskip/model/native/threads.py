"""How many threads the kernels work with."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_is_forked = False
# Those that this process may run on, as taskset and schedulers of jobs leave them. The kernels tell once
# they are loaded: the system says which ones a thread may run on, and OpenMP may have bound it to one.
processors: Callable[[], int] = lambda: os.cpu_count() or 1  # noqa: E731


def usable(panels: int | None = None) -> int:
    """PyTorch's threads, but no more than a container's share of the processors, or than there is work.

    All threads wait for each other several times a layer: where one is held up, all are.

    Args:
        panels: of the narrowest product; None = enough for all.
    """
    most = 1 if _is_forked else min(torch.get_num_threads(), processors(), _quota())
    return most if panels is None else max(1, min(most, panels))


def threads_of(kernels: str) -> int:
    """Threads of a pass on a CPU: those of the compiled kernels, or of PyTorch."""
    return usable() if kernels == "compiled" else torch.get_num_threads()


def stay_alone() -> None:
    """In a forked child: the threads of its parent are none of its own, and cannot be started again."""
    global _is_forked
    _is_forked = True
    torch.set_num_threads(1)


@functools.cache
def heed_forks() -> None:
    """Let children that are forked from now on work alone, without the threads of their parent."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=stay_alone)


@functools.cache
def _quota() -> int:
    """Processors that control groups may use at a time, rounded up; as many as you like without one."""
    limits = (share for share in _shares() if share > 0)  # version 1 says -1 for none
    return math.ceil(min(limits, default=1 << 16))


def _shares() -> Iterator[float]:
    """Time by period of the process's group and all above it, of both versions of control groups."""
    paths = {"/"}
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "" or "cpu" in kinds.split(","):
                paths |= {path, *map(str, PurePosixPath(path).parents)}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            limit, period = (_CGROUPS / path.lstrip("/") / "cpu.max").read_text().split()
            yield int(limit) / int(period)
        folder = _CGROUPS / "cpu" / path.lstrip("/")
        with contextlib.suppress(OSError, ValueError):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text() for name in names)
            yield int(quota) / int(period)
