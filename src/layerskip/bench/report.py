"""Tables, a Markdown report and figures of a benchmark's document."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.bench.bench import Metric, Row
from layerskip.bench.rows import headline, name_of
from layerskip.decoding import Sampling
from layerskip.figures import new_figure, png, write_figures
from layerskip.fileio import check_within, replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, OTHER = "#2f6f9f", "#9f9f9f"


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw speedup by mode, acceptance by position and quality over the exit layer.

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


def _new(height: float = 5.0) -> "tuple[Figure, Axes]":
    figure = new_figure(8, height)
    return figure, figure.add_subplot()


def _speedup(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Draw the speedup of each row over plain decoding of its system, with the 95% interval."""
    timed_rows = [row for row in rows if headline(row)[0] is not None]
    if not timed_rows:
        return None
    figure, axes = _new(1.2 + 0.4 * len(timed_rows))
    several = len({row["system"] for row in timed_rows}) > 1
    for y, row in enumerate(reversed(timed_rows)):
        speedup, interval = headline(row)
        assert speedup is not None
        axes.barh(y, speedup, color=OWN if row["system"] == "layerskip" else OTHER)
        low, high = interval or [speedup] * 2
        axes.plot([low, high], [y, y], color="black", linewidth=1.5)
        axes.annotate(
            f"{speedup:.2f}x",
            (max(high, speedup), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(
        range(len(timed_rows)), [name_of(row, system=several) for row in reversed(timed_rows)]
    )
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    axes.set(xlabel="speed over plain decoding of the same system", title="Speedup by mode")
    return figure


def _acceptance(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Draw the share of drafts accepted at each position of a round."""
    draft_rows = [row for row in rows if row["accepted_by_position"]]
    if not draft_rows:
        return None
    figure, axes = _new()
    for row in draft_rows:
        shares = row["accepted_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name_of(row))
    longest = max(len(row["accepted_by_position"]) for row in draft_rows)
    axes.set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1.02))
    axes.set_xticks(range(1, longest + 1))
    axes.set_title("Acceptance by position in the draft")
    axes.legend(fontsize="small")
    return figure


def _quality(rows: Sequence[dict[str, Any]], n_layers: int) -> "Figure | None":
    """Draw the metrics of early exit over the exit layer; the last layer is plain decoding."""
    layerskip_rows = [row for row in rows if row["system"] == "layerskip" and row["quality"]]
    by_exit = {
        row["exit_layer"]: row["quality"] for row in layerskip_rows if row["mode"] == "early-exit"
    }
    plain = [row["quality"] for row in layerskip_rows if row["mode"] == "plain"]
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


COLUMNS = 2


def plot_exits(rows: Sequence[Row], n_layers: int) -> bytes:
    """Draw every metric over the exit layers: one line a mode, bars of one standard error.

    Plain decoding is at the last layer.

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
                points[row.config.exit_layer or n_layers] = row.results[task][metric]
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


_TITLES = {
    "speedup.png": "Speed over plain decoding of the same system; lines are 95% intervals",
    "acceptance.png": "Acceptance by position in the draft",
    "quality.png": "Quality of early exit over the exit layer",
}

_ONLY_IN_REPORTS = frozenset(
    [
        "ms/token, median",
        "first token",
        "mean of prompts",
        "with prompt",
        "peak memory",
        "bandwidth",
        "lowest",
        "copied",
        "accepted from",
    ]
)


def write_report(document: dict[str, Any], folder: Path) -> Path:
    """Write report.md and its pictures; each file appears whole or not at all.

    Args:
        document: what `bench` returned.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The path of report.md.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file there is a link out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", *_TITLES):
        check_within(folder / name)
    pictures = draw(document, folder)
    text = markdown(document, [picture.name for picture in pictures])
    replace(folder / "report.md", text.encode())  # last: it refers to the pictures
    return folder / "report.md"


def markdown(document: dict[str, Any], pictures: Sequence[str]) -> str:
    """Return the report's text.

    Args:
        document: what `bench` returned.
        pictures: names of PNG files beside it.
    """
    parts = [
        f"# Benchmark of {as_text(document['model'])} on {as_text(document['task'])}",
        _conditions(document),
        markdown_table(table(document), escape=as_text),
        *(
            markdown_table(lines, escape=as_text)
            for lines in [categories(document)]
            if len(lines) > 1
        ),
        *(f"![{_TITLES[picture]}]({picture})" for picture in pictures),
        *_failures(document),
        "docs/reference/results.md of layerskip defines every figure.",
    ]
    return "\n\n".join(parts) + "\n"


def table(document: dict[str, Any], *, brief_of: str | None = None) -> list[list[str]]:
    """Return the figures as text: a heading and a line for each row, without empty columns.

    Args:
        document: what `bench` returned.
        brief_of: system whose rows to show, in the columns that fit on a terminal; None = all.
    """
    rows = [
        row for row in document["rows"] if "error" not in row and brief_of in (None, row["system"])
    ]
    metrics = list(dict.fromkeys(name for row in rows for name in row["quality"]))
    several = len({row["system"] for row in rows}) > 1
    columns: dict[str, list[str]] = {
        "mode": [name_of(row, system=several) for row in rows],
        "tokens/s": [_number(row["tokens_per_s"], ".1f") for row in rows],
        "ms/token, median": [_number(row["ms_per_token_median"], ".1f") for row in rows],
        "first token": [_number(row["ttft_s"], ".0f", scale=1e3, unit=" ms") for row in rows],
        "speedup (95%)": [
            _number(headline(row)[0], ".2f", unit="x") + _interval(row) for row in rows
        ],
        "mean of prompts": [
            _number(row.get("speedup_mean_of_prompts"), ".2f", unit="x") for row in rows
        ],
        "with prompt": [_number(row.get("speedup_with_prompt"), ".2f", unit="x") for row in rows],
        "lowest": [_number(row.get("speedup_lowest"), ".2f", unit="x") for row in rows],
        "copied": [_number(row.get("copied") or None, ".0%") for row in rows],
        "of copies": [_number(row.get("speedup_of_copies"), ".2f", unit="x") for row in rows],
        "looping": [_number(row.get("looping") or None, ".0%") for row in rows],
        "echoing": [_number(row.get("echoing") or None, ".0%") for row in rows],
        "with these": [
            _number(row.get("speedup"), ".2f", unit="x")
            if row.get("looping") or row.get("echoing")
            else ""
            for row in rows
        ],
        "accepted from": [_sources(row) for row in rows],
        "vs layerskip": [_number(row.get("vs_layerskip_plain"), ".2f", unit="x") for row in rows],
        "accepted": [_number(row["acceptance_rate"], ".0%") for row in rows],
        "tokens a round": [_number(row["mean_accepted_length"], ".2f") for row in rows],
        "same as plain": [_number(row["identical_to_plain"], ".0%") for row in rows],
        **{
            name.replace("_", " "): [_number(row["quality"].get(name), ".3f") for row in rows]
            for name in metrics
        },
        "peak memory": [
            _number(row["peak_memory_bytes"], ".0f", scale=2**-20, unit=" MiB") for row in rows
        ],
        "bandwidth": [_number(row["share_of_bandwidth"], ".0%") for row in rows],
    }
    left_out = frozenset() if brief_of is None else _ONLY_IN_REPORTS
    used = {n: cells for n, cells in columns.items() if n not in left_out and any(cells)}
    return [list(used), *(list(line) for line in zip(*used.values(), strict=True))]


def categories(document: dict[str, Any]) -> list[list[str]]:
    """Return speedup and acceptance by category: a heading, and a line for each row that has them."""
    rows = [row for row in document["rows"] if "categories" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["categories"]))
    several = len({row["system"] for row in rows}) > 1
    lines = [["mode", *names]]
    for row in rows:
        cells = []
        for name in names:
            figures = row["categories"][name]
            rate = _number(figures["acceptance_rate"], ".0%")
            speedup = _number(figures.get("speedup"), ".2f", unit="x")
            cells.append(f"{speedup} ({rate})" if rate else speedup)
        lines.append([name_of(row, system=several), *cells])
    return lines


def conditions(document: dict[str, Any]) -> list[str]:
    """Return the conditions of the measurement, one phrase each."""
    e = document["environment"]
    threads = f"{e['threads']} threads" if e["device"] == "cpu" else e["device"]
    kv_cache = e.get("kv_cache", "auto")  # older documents do not say it
    cache = "" if kv_cache == "auto" else f", {kv_cache} KV cache"
    capability = "; ".join(filter(None, (e.get("cpu_model"), e["cpu_capability"])))
    phrases = [
        f"{document['samples']} prompts of {document['prompt_tokens_mean']:.0f} tokens on average",
        f"at most {document['max_new_tokens']} new tokens, {_sampling(document)}, batch 1",
        f"{document['repeats']} repetition{'s' * (document['repeats'] > 1)} after a warm-up",
        f"{e['dtype']}, {e['weights']} weights{cache}, {threads}, {e['cpu']} ({capability})",
        f"read bandwidth {document['read_bandwidth_bytes_per_s'] / 1e9:.0f} GB/s: at most"
        f" {document['ceiling_tokens_per_s']:.0f} tokens/s plain",
    ]
    if document["skipped_too_long"]:
        phrases.insert(
            1, f"{document['skipped_too_long']} prompts too long for the context left out"
        )
    if document["ignore_eos"]:
        phrases.insert(1, "answers continue past their end, and are not scored")
    interrupted = document.get("interrupted", False)  # older documents do not say it
    if document.get("not_scored") and not interrupted:
        phrases.insert(1, f"the answers could not be judged ({document['not_scored']})")
    if interrupted:
        phrases.insert(1, "interrupted: the prompts answered so far, not scored")
    if any(row["system"] == "llama.cpp" and "error" not in row for row in document["rows"]):
        phrases.append(f"llama.cpp on {document['gguf_weights']} weights")
    return phrases


def _sampling(document: dict[str, Any]) -> str:
    """Describe the sampling options; older documents have none."""
    sampling, default = Sampling(**document.get("sampling", {})), Sampling()
    names = [field.name for field in dataclasses.fields(sampling)]
    if sampling.greedy:  # the others have no effect
        names = ["repetition_penalty"]
    changed = [name for name in names if getattr(sampling, name) != getattr(default, name)]
    words = [f"{name.replace('_', ' ')} {getattr(sampling, name)}" for name in changed]
    return ", ".join(["greedy", *words] if sampling.greedy else words)


def _conditions(document: dict[str, Any]) -> str:
    e = document["environment"]
    versions = [
        f"{name} {e[name]}"
        for name in (
            "layerskip",
            "torch",
            "transformers",
            "xllamacpp",
            "llama-cpp-python",
            "python",
        )
        if e.get(name)
    ]
    builds = [f"{name}: {value}" for name, value in e.items() if name.endswith(" build")]
    lines = [*conditions(document), ", ".join(versions), *builds, f"{e['system']}, {e['date']}"]
    return "\n".join(f"- {as_text(line)}" for line in lines)


def escaped(text: str) -> str:
    """Escape Markdown text for one cell or line, without HTML."""
    line = " ".join(text.split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def as_text(text: str) -> str:
    """Escape text of others, such as a category's name, so that Markdown shows it literally."""
    return escaped(re.sub(r"[\\`*_\[\]]", r"\\\g<0>", text))


def markdown_table(lines: Sequence[Sequence[str]], escape: Callable[[str], str] = escaped) -> str:
    """Return a table in Markdown; all columns but the first are numbers.

    Args:
        lines: cells.
        escape: applied to each cell; `as_text` for cells that are not Markdown.
    """
    heading, *rest = lines
    marks = ["---", *["---:"] * (len(heading) - 1)]
    written = (map(escape, heading), marks, *(map(escape, line) for line in rest))
    return "\n".join("| " + " | ".join(line) + " |" for line in written)


def _failures(document: dict[str, Any]) -> list[str]:
    failed = [row for row in document["rows"] if "error" in row]
    lines = [f"- {name_of(row, system=True)}: {as_text(row['error'])}" for row in failed]
    return ["\n".join(["Without figures:", "", *lines])] if lines else []


def _number(value: float | None, form: str, *, scale: float = 1.0, unit: str = "") -> str:
    return "" if value is None else format(value * scale, form) + unit


def _sources(row: dict[str, Any]) -> str:
    """Return which sources the accepted tokens came from, where there are several."""
    counts = row.get("accepted_by_source") or {}
    if len(counts) < 2:
        return ""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{source} {n / total:.0%}" for source, n in ordered)


def _interval(row: dict[str, Any]) -> str:
    interval = headline(row)[1]
    if interval is None or row["mode"] == "plain":  # plain over itself is 1 by definition
        return ""
    return f" ({interval[0]:.2f}-{interval[1]:.2f})"
