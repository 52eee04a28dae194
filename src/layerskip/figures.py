"""Pictures of a training run, drawn from its log."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.fileio import replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXIT = re.compile(r"(eval_)?(loss|accuracy)_exit_(\d+)")


def exit_series(
    logs: Sequence[dict[str, Any]], name: str
) -> dict[int, tuple[list[float], list[float]]]:
    """Steps and values of a figure for every exit, such as `loss` or `eval_accuracy`."""
    series: dict[int, tuple[list[float], list[float]]] = {}
    for log in logs:
        for key, value in log.items():
            match = _EXIT.fullmatch(key)
            if match and f"{match[1] or ''}{match[2]}" == name:
                steps, values = series.setdefault(int(match[3]), ([], []))
                steps.append(log["step"])
                values.append(value)
    return dict(sorted(series.items()))


def plot_run(logs: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Draw loss over steps for every exit, and accuracy over the layers.

    The accuracy is the last evaluation's; without one, that of the last steps in which an exit learnt.

    Args:
        logs: the lines of the run's log.
        directory: where the pictures go.

    Returns:
        The files written; none where the log has nothing to draw or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    pictures = {}
    losses, accuracies = exit_series(logs, "loss"), exit_series(logs, "eval_accuracy")
    of = "last evaluation"
    if not accuracies:
        accuracies, of = exit_series(logs, "accuracy"), "in training"
    if losses:
        figure = new_figure(8, 5)
        axes = figure.add_subplot()
        for place, (exit_layer, (steps, values)) in enumerate(losses.items()):
            shade = place / max(len(losses) - 1, 1)
            axes.plot(steps, values, color=(1 - shade, 0.2, shade), label=f"exit {exit_layer}")
        axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training loss of each exit")
        axes.legend(fontsize="small", ncols=2)
        pictures["loss_per_exit.png"] = figure
    if accuracies:
        figure = new_figure(8, 5)
        axes = figure.add_subplot()
        last = [values[-1] for _, values in accuracies.values()]
        axes.plot(list(accuracies), last, marker="o")
        axes.set(xlabel="exit layer (layers run)", ylabel="token accuracy", ylim=(0, 1))
        axes.set_title(f"Token accuracy of each exit, {of}")
        pictures["accuracy_over_layers.png"] = figure
    return write_figures(pictures, directory)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; ImportError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; run: pip install 'layerskip[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figures(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write each figure as a PNG of its name; a file appears whole or not at all."""
    for name, figure in figures.items():
        replace(directory / name, png(figure))
    return [directory / name for name in figures]


def png(figure: Figure) -> bytes:
    """A figure as a PNG, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call, unused-ignore]
    return picture.getvalue()
