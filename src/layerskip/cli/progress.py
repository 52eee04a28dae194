"""Progress on stderr, where that is a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

REDRAWN_S = 0.5  # more often would take time from what is being timed

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is, and of how much."""


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """A bar for every stretch of work that is reported."""
    console = Console(file=sys.stderr)  # this very file, whatever stands for stderr meanwhile
    # No thread draws it: it would take time from what is being timed.
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
    known: dict[str, Any] = {}
    drawn = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal drawn
        is_due = what not in known or done == total or time.monotonic() - drawn > REDRAWN_S
        if what not in known:
            known[what] = shown.add_task(what)
        shown.update(known[what], completed=done, total=total, refresh=is_due)
        drawn = time.monotonic() if is_due else drawn

    with shown:
        yield report


def track(things: Sequence[Any], what: str) -> Iterable[Any]:
    """The things, with a bar of how many there have been."""
    console = Console(stderr=True)
    return rich_track(things, what, console=console, disable=not sys.stderr.isatty())
