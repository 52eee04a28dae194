"""Progress of the demo's training: time left, loss, and the accuracy of each exit, as bars."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from layerskip.bench.report import OTHER, OWN

if TYPE_CHECKING:  # needs the packages of the extra
    from layerskip.training import Progress

_WIDTH = 40  # of a full bar
_LINE_S = 20.0  # between two lines in a file


class TrainBars:
    """A context in which the object, called with a run's progress, shows it.

    A terminal has bars that grow; a file gets a line now and then.

    Args:
        console: to show it on.
        minutes: the duration of the training.
    """

    def __init__(self, console: Console, minutes: float) -> None:
        self._console, self._seconds = console, 60 * minutes
        self._start = time.monotonic()
        self._step: int | None = None
        self._figures: dict[str, float] = {}
        self._first_loss: float | None = None
        self._printed_at = -_LINE_S
        is_live = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._live = Live(self, console=console, refresh_per_second=2) if is_live else None

    def __enter__(self) -> TrainBars:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, report: Progress) -> None:
        """Take in the progress; the first report starts the clock."""
        if self._step is None:
            self._start = time.monotonic()
        self._step = report.step
        figures = {name: v for name, v in report.logs.items() if name == "loss" or is_exit(name)}
        self._figures |= figures
        if self._first_loss is None:
            self._first_loss = figures.get("loss")
        is_due = time.monotonic() - self._printed_at >= _LINE_S
        if figures and self._live is None and is_due:
            self._printed_at = time.monotonic()
            parts = (f"{_name(name)} {_figure(name, v)}" for name, v in figures.items())
            self._console.print(
                f"step {report.step}, {self._left()}: {', '.join(parts)}", soft_wrap=True
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the bars."""
        grid = Table.grid(padding=(0, 1))
        if self._step is None:
            yield Text("loading model and rows ...")
            return
        share = min(1.0, self._elapsed_s / self._seconds)
        grid.add_row("training", _bar(share, OTHER), f"step {self._step}, {self._left()}")
        for name in sorted(self._figures, key=_order):
            value = self._figures[name]
            share = value / (self._first_loss or 1.0) if name == "loss" else value
            color = OTHER if name == "loss" else OWN
            grid.add_row(_name(name), _bar(share, color), _figure(name, value))
        yield grid

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def _left(self) -> str:
        minutes, seconds = divmod(round(max(0.0, self._seconds - self._elapsed_s)), 60)
        return f"{minutes}:{seconds:02} left"


def is_exit(name: str) -> bool:
    """Return True for the accuracy of an exit, the last layer's included."""
    return name.startswith("accuracy_exit_")


def _order(name: str) -> int:
    return int(name.rpartition("_")[2]) if is_exit(name) else 0


def _name(name: str) -> str:
    return f"exit {name.rpartition('_')[2]}" if is_exit(name) else name


def _figure(name: str, value: float) -> str:
    return f"{value:.0%} of tokens right" if is_exit(name) else f"{value:.3g}"


def _bar(share: float, color: str) -> Bar:
    return Bar(1.0, 0, min(share, 1.0), width=_WIDTH, color=color)
