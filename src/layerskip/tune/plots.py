"""Figures of a tuning: the map of predicted speedups, and predictions against real runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerskip.figures import new_figure, write_figures
from layerskip.fileio import check_within
from layerskip.tune.tune import Tuning, name_of_auto

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_tuning(tuning: Tuning, directory: Path) -> list[Path]:
    """Draw the figures into a folder, which is created if needed.

    Returns:
        The PNG files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file there is a link out of the folder.
    """
    figures = {"map.png": _map(tuning), "agreement.png": _agreement(tuning)}
    if tuning.grid is not None:
        figures["predicted_and_measured.png"] = _predicted_and_measured(tuning)
    directory.mkdir(parents=True, exist_ok=True)
    for name in figures:
        check_within(directory / name)
    return write_figures(figures, directory)


def _map(tuning: Tuning) -> Figure:
    """Draw the predicted speedup of every exit layer (down) and draft length (across)."""
    exits = tuning.costs.exits
    longest = max(p.draft_tokens for p in tuning.predictions)
    speedups = np.zeros((len(exits), longest))
    for p in tuning.predictions:
        speedups[exits.index(p.exit_layer), p.draft_tokens - 1] = p.speedup
    # Red is slower than plain decoding, blue is faster.
    reach = max(abs(speedups - 1.0).max(), 0.05)
    figure = new_figure(8, max(3.0, 1.5 + 0.25 * len(exits)))
    axes = figure.add_subplot()
    image = axes.imshow(speedups, cmap="RdBu", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    figure.colorbar(image, label="predicted speedup over plain decoding")
    for (y, x), value in np.ndenumerate(speedups):
        dark = abs(value - 1.0) > 0.6 * reach
        colour = "white" if dark else "black"
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(longest), [str(d) for d in range(1, longest + 1)])
    axes.set_yticks(range(len(exits)), [str(e) for e in exits])
    axes.set(xlabel="draft tokens d", ylabel="exit layer E", title=_title(tuning))
    for i, confirmed in enumerate(tuning.confirmed[1:]):
        at = (confirmed["draft_tokens"] - 1, exits.index(confirmed["exit_layer"]))
        axes.plot(*at, "s", ms=17, mfc="none", mec="black", label="" if i else "measured")
    if tuning.choice.exit_layer is not None and tuning.choice.draft_tokens is not None:
        at = (tuning.choice.draft_tokens - 1, exits.index(tuning.choice.exit_layer))
        axes.plot(*at, "s", ms=17, mfc="none", mec="lime", mew=3, label="written")
    figure.legend(loc="outside lower center", ncols=2, markerscale=0.5)
    return figure


def _title(tuning: Tuning) -> str:
    choice = tuning.choice
    if choice.mode == "plain":
        result = "plain decoding is best"
    else:
        drafts = name_of_auto(choice.exit_layer)
        if choice.mode == "self-speculative":
            drafts += f", d={choice.draft_tokens}"
        result = f"chosen: {choice.mode} with {drafts}, measured {choice.speedup:.2f}x"
    return f"Speedup predicted from measured costs; {result}"


def _agreement(tuning: Tuning) -> Figure:
    """Draw the agreement of each exit with the model's next token, and the cost of its draft step."""
    costs = tuning.costs
    middle = costs.middle
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot(costs.exits, [row["agreement"] for row in tuning.exits], "o-", label="agreement")
    step = costs.draft_step_s[middle] / costs.plain_s[middle]
    axes.plot(costs.exits, step, "s--", label="cost of a draft step / a plain step")
    axes.set(xlabel="exit layer E", ylabel="share", ylim=(0, None))
    axes.set_title("What a draft costs and how often it is right")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _predicted_and_measured(tuning: Tuning) -> Figure:
    assert tuning.grid is not None
    rows = tuning.grid[1:]
    figure = new_figure(8, 6.5)
    axes = figure.add_subplot()
    predicted = [row["predicted_speedup"] for row in rows]
    measured = [row["speedup"] for row in rows]
    exits = [row["exit_layer"] for row in rows]
    points = axes.scatter(predicted, measured, c=exits, cmap="viridis", s=14)
    figure.colorbar(points, label="exit layer E")
    ends = np.array([min(*predicted, *measured), max(*predicted, *measured)])
    axes.plot(ends, ends, "k-", lw=1, label="as predicted")
    axes.fill_between(
        ends, ends * 0.85, ends * 1.15, color="grey", alpha=0.2, label="15% to either side"
    )
    axes.set(xlabel="predicted speedup", ylabel="measured speedup")
    axes.set_title("Every exit layer and draft length, run for real")
    axes.legend()
    return figure
