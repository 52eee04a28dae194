"""Progress on stderr, where that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is, and of how much."""


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """A bar for every stretch of work that is reported."""
    console = Console(file=sys.stderr)  # this very file, whatever stands for stderr meanwhile
    # No thread draws it: it would take time from what is being timed.
    shown = Progress(
        TextColumn("{task.description}"),
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

    def report(what: str, done: int, total: int) -> None:
        if what not in known:
            known[what] = shown.add_task(what)
        shown.update(known[what], completed=done, total=total, refresh=True)

    with shown:
        yield report


def track(things: Sequence[Any], what: str) -> Iterable[Any]:
    """The things, with a bar of how many there have been."""
    console = Console(stderr=True)
    return rich_track(things, what, console=console, disable=not sys.stderr.isatty())
