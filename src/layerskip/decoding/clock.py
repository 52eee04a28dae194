"""A clock that waits for the device, so that what it measures has really happened."""

import time
from collections.abc import Callable

import torch


def device_clock(device: torch.device) -> Callable[[], float]:
    """A function that returns seconds, read after all work that its thread has queued is done.

    It waits for a stream and not for the whole device: that would wait for other threads' work too, and
    fail while one of them captures a CUDA graph.
    """
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    return now
