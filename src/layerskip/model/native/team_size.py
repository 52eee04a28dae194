"""Chooses the number of threads of each pass: fewer while other processes keep the cores busy.

All threads wait for each other several times in a layer, so a thread that the scheduler has paused
delays all others: with another process on the same cores, one thread can be faster than two. The kernels
count how long threads wait (`threads.h`). Results do not depend on the number of threads.
"""

import ctypes
import functools
import time
from collections.abc import Callable

from layerskip.model.native.build import library, num_threads_to_use

MAX_WAITING = 1 / 3  # of the time of passes: two threads are 1.5 to 2 times as fast as one
WINDOW_NS = 50_000_000  # several time slices of the scheduler
MIN_RETRY_NS, MAX_RETRY_NS = 200_000_000, 2_000_000_000


def team_size(tiles: int | None = None) -> int:
    """Return the number of threads of the next pass, at most `num_threads_to_use(tiles)`."""
    maximum = num_threads_to_use(tiles)
    return maximum if maximum == 1 else _team_size().choose(maximum)


class TeamSize:
    """Removes a quarter of the threads when threads wait, and tries more again after a while.

    A window ends after 50 ms of passes, or as soon as threads have waited for a third of that. More
    threads are tried after 0.2 s, and after twice the time whenever that fails, up to 2 s. Within a long
    pass, the kernels remove threads by the same rule.

    Args:
        pass_times: total nanoseconds of passes with several threads, and the nanoseconds that threads
            waited in them.
        clock: in nanoseconds.
    """

    def __init__(
        self,
        pass_times: "list[int] | ctypes.Array[ctypes.c_int64]",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._pass_times, self._clock = pass_times, clock
        self._size = self._limit = 2**31 - 1
        self._is_trial = False
        self._retry_ns, self._retry_at = MIN_RETRY_NS, 0
        self._start_window()

    def choose(self, maximum: int) -> int:
        """Return the number of threads of the next pass, from 1 to `maximum`."""
        elapsed = self._pass_times[0] - self._start[0]
        waited = self._pass_times[1] - self._start[1]
        if waited > MAX_WAITING * max(elapsed, WINDOW_NS):
            longer = min(2 * self._retry_ns, MAX_RETRY_NS)
            self._retry_ns = longer if self._is_trial else MIN_RETRY_NS
            self._retry_at = self._clock() + self._retry_ns
            self._limit = max(1, self._size - -(-self._size // 4))
            self._is_trial = False
            self._start_window()
        elif elapsed > WINDOW_NS:
            self._is_trial = False
            self._start_window()
        if self._limit < maximum and not self._is_trial and self._clock() >= self._retry_at:
            self._limit += -(-self._limit // 4)
            self._is_trial = True
            self._start_window()
        self._size = min(self._limit, maximum)
        return self._size

    def _start_window(self) -> None:
        self._start = tuple(self._pass_times)


@functools.cache
def _team_size() -> TeamSize:
    return TeamSize((ctypes.c_int64 * 2).in_dll(library(), "layerskip_pass_times"))
