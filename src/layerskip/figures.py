"""Plots: one way to make a figure and to write it as a PNG, and the plots of a training run."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.fileio import replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXIT = re.compile(r"(eval_)?(loss|accuracy)_exit_(\d+)")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; run: pip install 'layerskip[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure, dpi: float | None = None) -> bytes:
    """Return a figure as a PNG, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if dpi is not None:
        figure.set_dpi(dpi)
    picture = io.BytesIO()
    with warnings.catch_warnings():  # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call, unused-ignore]
    return picture.getvalue()


def write_figures(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write each figure as a PNG under its name, atomically; return the paths."""
    for name, figure in figures.items():
        replace(directory / name, png(figure))
    return [directory / name for name in figures]


def exit_series(
    logs: Sequence[dict[str, Any]], name: str
) -> dict[int, tuple[list[float], list[float]]]:
    """Return steps and values of a metric such as `loss` or `eval_accuracy`, by exit layer."""
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
    """Plot the loss of every exit over the steps, and the accuracy over the layers.

    The accuracy is that of the last evaluation; without one, that of each exit's last training step.

    Args:
        logs: the lines of the run's log.
        directory: folder of the plots.

    Returns:
        The files written; none if the log has no such metrics or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    figures = {}
    losses, accuracies = exit_series(logs, "loss"), exit_series(logs, "eval_accuracy")
    source = "last evaluation"
    if not accuracies:
        accuracies, source = exit_series(logs, "accuracy"), "in training"
    if losses:
        figures["loss_per_exit.png"] = figure = new_figure(8, 5)
        axes = figure.add_subplot()
        for i, (exit_layer, (steps, values)) in enumerate(losses.items()):
            shade = i / max(len(losses) - 1, 1)
            axes.plot(steps, values, color=(1 - shade, 0.2, shade), label=f"exit {exit_layer}")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss of each exit")
        axes.legend(fontsize="small", ncols=2)
    if accuracies:
        figures["accuracy_over_layers.png"] = figure = new_figure(8, 5)
        axes = figure.add_subplot()
        axes.plot(list(accuracies), [values[-1] for _, values in accuracies.values()], marker="o")
        axes.set(xlabel="exit layer (layers run)", ylabel="token accuracy", ylim=(0, 1))
        axes.set_title(f"Token accuracy of each exit, {source}")
    return write_figures(figures, directory)
