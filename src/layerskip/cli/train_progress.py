"""How a training run is shown on stderr: a bar on a terminal, a line for every log elsewhere."""

import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerskip.training import Progress as Report


class _Console(Console):
    """On stderr; where whoever read that has left, it is silent, and the training goes on."""

    def on_broken_pipe(self) -> None:
        """See `Console`, which would end the program."""
        self.quiet = True


class TrainProgress:
    """A context in which the object, called with a run's progress, shows it.

    Args:
        is_shown: False in all processes but one.
        figures: says of a figure's name whether a line shows it; by default all are shown, those of
            single exits in short.
    """

    def __init__(self, *, is_shown: bool, figures: Callable[[str], bool] | None = None) -> None:
        self._shows_exits = figures is None
        self._figures = figures or (lambda name: "_exit_" not in name)
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (is_shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("loading model and data", total=None)

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: Report) -> None:
        """Move the bar, and print a line where there are figures to show."""
        self._bar.update(
            self._task, description="training", completed=report.step, total=report.total_steps
        )
        shown = [f"{k} {v:.4g}" for k, v in report.logs.items() if self._figures(k)]
        shown += _of_exits(report.logs) if self._shows_exits else []
        if shown:
            self._console.print(f"step {report.step}/{report.total_steps}: {', '.join(shown)}")


def _of_exits(logs: Mapping[str, float]) -> list[str]:
    """Loss and token accuracy of each exit: "exit 8 0.31 (91%)", in evaluation "eval exit 8 ..."."""
    said = []
    for kind in ("", "eval_"):
        loss, accuracy = f"{kind}loss_exit_", f"{kind}accuracy_exit_"
        for e in sorted(int(key.removeprefix(loss)) for key in logs if key.startswith(loss)):
            figures = f"{logs[f'{loss}{e}']:.3g} ({logs[f'{accuracy}{e}']:.0%})"
            said.append(f"{kind.replace('_', ' ')}exit {e} {figures}")
    return said
