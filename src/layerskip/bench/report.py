"""A benchmark's document as a Markdown report with pictures."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerskip.bench.plots import draw
from layerskip.bench.rows import name_of
from layerskip.decoding import Sampling
from layerskip.model.files.writing import replace

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
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(document, folder)
    text = markdown(document, [picture.name for picture in pictures])
    replace(folder / "report.md", text.encode())  # last: it refers to the pictures
    return folder / "report.md"


def markdown(document: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report's text.

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
        "Every figure is defined in the documentation of `layerskip bench` (docs/bench.md).",
    ]
    return "\n\n".join(parts) + "\n"


def table(document: dict[str, Any], *, brief_of: str | None = None) -> list[list[str]]:
    """The figures as text: a heading and a line for each row, without columns that would be empty.

    Args:
        document: what `bench` returned.
        brief_of: one system's rows, and only what fits on a terminal; None means all.
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
            _number(row.get("speedup"), ".2f", unit="x") + _interval(row) for row in rows
        ],
        "mean of prompts": [
            _number(row.get("speedup_mean_of_prompts"), ".2f", unit="x") for row in rows
        ],
        "with prompt": [_number(row.get("speedup_with_prompt"), ".2f", unit="x") for row in rows],
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
    """Speedup and acceptance by category, a heading and a line for each row; only a heading if none."""
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
    """What the figures depend on, a phrase each."""
    e = document["environment"]
    threads = f"{e['threads']} threads" if e["device"] == "cpu" else e["device"]
    capability = "; ".join(filter(None, (e.get("cpu_model"), e["cpu_capability"])))
    phrases = [
        f"{document['samples']} prompts of {document['prompt_tokens_mean']:.0f} tokens on average",
        f"at most {document['max_new_tokens']} new tokens, {_sampling(document)}, batch 1",
        f"{document['repeats']} repetition{'s' * (document['repeats'] > 1)} after a warm-up",
        f"{e['dtype']}, {e['weights']} weights, {threads}, {e['cpu']} ({capability})",
        f"read bandwidth {document['read_bandwidth_bytes_per_s'] / 1e9:.0f} GB/s: at most"
        f" {document['ceiling_tokens_per_s']:.0f} tokens/s plain",
    ]
    if document["skipped_too_long"]:
        phrases.insert(
            1, f"{document['skipped_too_long']} prompts too long for the context left out"
        )
    if document["ignore_eos"]:
        phrases.insert(1, "answers go on past their end, and are not scored")
    interrupted = document.get("interrupted", False)  # older documents do not say it
    if document.get("not_scored") and not interrupted:
        phrases.insert(1, f"the answers could not be judged ({document['not_scored']})")
    if interrupted:
        phrases.insert(1, "interrupted: the prompts answered so far, not scored")
    if any(row["system"] == "llama.cpp" and "error" not in row for row in document["rows"]):
        phrases.append(f"llama.cpp on {document['gguf_weights']} weights")
    return phrases


def _sampling(document: dict[str, Any]) -> str:
    """How tokens were chosen, in words; older documents do not say it."""
    how, default = Sampling(**document.get("sampling", {})), Sampling()
    names = [field.name for field in dataclasses.fields(how)]
    if how.greedy:  # what would be cut off is not the likeliest
        names = ["repetition_penalty"]
    changed = [name for name in names if getattr(how, name) != getattr(default, name)]
    words = [f"{name.replace('_', ' ')} {getattr(how, name)}" for name in changed]
    return ", ".join(["greedy", *words] if how.greedy else words)


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
    """A text in Markdown as one cell or line of it, without HTML."""
    line = " ".join(text.split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def as_text(text: str) -> str:
    """A text that others wrote, such as a category's name, as Markdown shows it and nothing more."""
    return escaped(re.sub(r"[\\`*_\[\]]", r"\\\g<0>", text))


def markdown_table(lines: Sequence[Sequence[str]], escape: Callable[[str], str] = escaped) -> str:
    """A heading and its lines in Markdown; all columns but the first are numbers.

    Args:
        lines: cells.
        escape: what is done to each; `as_text` for those that are no Markdown.
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


def _interval(row: dict[str, Any]) -> str:
    interval = row.get("speedup_interval")
    if interval is None or row["mode"] == "plain":  # plain over itself is 1 by definition
        return ""
    return f" ({interval[0]:.2f}-{interval[1]:.2f})"
