"""How many threads the kernels work with."""

import functools
import math
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def usable(panels: int | None = None) -> int:
    """PyTorch's threads, but no more than a container's share of the processors, or than there is work.

    All threads wait for each other several times a layer: where one is held up, all are.

    Args:
        panels: of the narrowest product; None = enough for all.
    """
    most = min(torch.get_num_threads(), _quota())
    return most if panels is None else max(1, min(most, panels))


@functools.cache
def _quota() -> int:
    """Processors that a control group may use at a time, rounded up; as many as you like without one."""
    try:  # version 2
        limit, period = (_CGROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1
            limit, period = (
                (_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text()
                for name in ("quota", "period")
            )
        except OSError:
            limit, period = "max", "1"
    try:
        share = int(limit) / int(period)
    except ValueError:  # "max"
        share = -1.0
    return math.ceil(share) if share > 0 else 1 << 16
