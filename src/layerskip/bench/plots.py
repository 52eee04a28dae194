"""Pictures of a benchmark, drawn from its document."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.bench.rows import name_of
from layerskip.training.plots import new_figure, png, write_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, OTHER = "#2f6f9f", "#9f9f9f"


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the document has: speedup by mode, acceptance by position, quality over exit layer.

    Returns:
        The PNG files written into the folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in document["rows"] if "error" not in row]
    figures = {
        "speedup.png": _speedup(rows),
        "acceptance.png": _acceptance(rows),
        "quality.png": _quality(rows, document["n_layers"]),
    }
    return write_figures({k: v for k, v in figures.items() if v is not None}, folder)


def draw_by_group(groups: Sequence[dict[str, Any]]) -> bytes:
    """Draw tokens/s of plain decoding and of another mode, side by side for every group of prompts.

    Args:
        groups: each with `task`, its name, and two `rows`, plain decoding's first.

    Returns:
        A PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _new()
    for i, color in enumerate((OTHER, OWN)):
        speeds = [group["rows"][i]["tokens_per_s"] or 0.0 for group in groups]
        places = [at + 0.4 * i for at in range(len(groups))]
        bars = axes.bar(places, speeds, 0.38, color=color, label=groups[0]["rows"][i]["mode"])
        axes.bar_label(bars, fmt="{:.0f}", padding=2)
    axes.set_xticks([at + 0.2 for at in range(len(groups))], [group["task"] for group in groups])
    axes.margins(y=0.12)
    axes.set(ylabel="tokens/s", title="Speed on the same prompts")
    axes.legend(fontsize="small")
    return png(figure)


def _new(height: float = 5.0) -> "tuple[Figure, Axes]":
    figure = new_figure(8, height)
    return figure, figure.add_subplot()


def _speedup(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Each row over plain decoding of its own system, with the 95% interval."""
    shown = [row for row in rows if row.get("speedup") is not None]
    if not shown:
        return None
    figure, axes = _new(1.2 + 0.4 * len(shown))
    several = len({row["system"] for row in shown}) > 1
    for place, row in enumerate(reversed(shown)):
        axes.barh(place, row["speedup"], color=OWN if row["system"] == "layerskip" else OTHER)
        low, high = row["speedup_interval"] or [row["speedup"]] * 2
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
        axes.annotate(
            f"{row['speedup']:.2f}x",
            (max(high, row["speedup"]), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(shown)), [name_of(row, system=several) for row in reversed(shown)])
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    axes.set(xlabel="speed over plain decoding of the same system", title="Speedup by mode")
    return figure


def _acceptance(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Share of drafts accepted at each position of a round."""
    shown = [row for row in rows if row["accepted_by_position"]]
    if not shown:
        return None
    figure, axes = _new()
    for row in shown:
        shares = row["accepted_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name_of(row))
    longest = max(len(row["accepted_by_position"]) for row in shown)
    axes.set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1.02))
    axes.set_xticks(range(1, longest + 1))
    axes.set_title("Acceptance by position in the draft")
    axes.legend(fontsize="small")
    return figure


def _quality(rows: Sequence[dict[str, Any]], n_layers: int) -> "Figure | None":
    """Each metric of early exit over the exit layer; plain decoding is the exit at the last layer."""
    own = [row for row in rows if row["system"] == "layerskip" and row["quality"]]
    by_exit = {row["exit_layer"]: row["quality"] for row in own if row["mode"] == "early-exit"}
    plain = [row["quality"] for row in own if row["mode"] == "plain"]
    if not by_exit or not plain:
        return None
    by_exit[n_layers] = plain[0]
    figure, axes = _new()
    exits = sorted(by_exit)
    for metric in by_exit[n_layers]:
        values = [by_exit[e].get(metric, float("nan")) for e in exits]
        axes.plot(exits, values, marker="o", label=metric)
    axes.set(xlabel="exit layer (layers run)", ylabel="quality", ylim=(0, 1.02))
    axes.set_title("Quality of early exit")
    axes.legend(fontsize="small")
    return figure
