"""A picture of what every exit reaches."""

import math
from collections.abc import Sequence
from typing import Any

from layerskip.bench.evaluation import Metric, Row
from layerskip.training.plots import new_figure, png

COLUMNS = 2


def plot_exits(rows: Sequence[Row], n_layers: int) -> bytes:
    """Every metric over the exit layers: a line a mode, bars of one standard error.

    Plain decoding stands at the last layer.

    Args:
        rows: with results.
        n_layers: of the model.

    Returns:
        A PNG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no results.
    """
    panels = list(
        dict.fromkeys((t, m) for row in rows for t in row.results for m in row.results[t])
    )
    if not panels:
        raise ValueError("the tasks have given no figure that could be drawn")
    columns = min(COLUMNS, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = new_figure(4.2 * columns, 3.2 * height)
    for index, (task, metric) in enumerate(panels, 1):
        axes = figure.add_subplot(height, columns, index)
        by_mode: dict[str, dict[int, Metric]] = {}
        for row in rows:
            if metric in row.results.get(task, {}):
                points = by_mode.setdefault(row.mode, {})
                points[row.plan.exit_layer or n_layers] = row.results[task][metric]
        for mode, points in by_mode.items():
            _draw(axes, mode, points)
        axes.set_title(task, parse_math=False)  # names may have dollars
        axes.set_ylabel(metric, parse_math=False)
        axes.set(xlabel="exit layer (layers run)", xlim=(0, n_layers + 1))
        axes.legend(fontsize="small")
    return png(figure)


def _draw(axes: Any, mode: str, points: dict[int, Metric]) -> None:
    exits = sorted(points)
    values = [points[e].value for e in exits]
    errors = [points[e].stderr or 0.0 for e in exits]
    axes.errorbar(exits, values, yerr=errors, marker="o", capsize=3, label=mode)
    if min(values) > 0 and max(values) > 100 * min(values):  # perplexity of untrained exits
        axes.set_yscale("log")
