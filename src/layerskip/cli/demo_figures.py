"""What the demo measured: groups of rows, as one table and one picture."""

from collections.abc import Sequence
from typing import Any

from rich.bar import Bar
from rich.markup import escape
from rich.table import Table

from layerskip.bench.measure import Entry
from layerskip.bench.plots import OTHER, OWN
from layerskip.bench.rows import row
from layerskip.decoding import LayerSkipModel

Group = dict[str, Any]  # task, samples, and rows: plain decoding's first


def group_of(name: str, entries: Sequence[Entry]) -> Group:
    """A kind of prompts with the rows of all modes; the first is plain decoding."""
    rows = [row(entry, plain=entries[0].runs) for entry in entries]
    return {"task": name, "samples": len(entries[0].runs), "rows": rows}


def together(groups: Sequence[Sequence[Entry]]) -> list[Entry]:
    """The runs of each mode over all kinds of prompts."""
    return [
        Entry(of_mode[0].system, of_mode[0].setting, [run for e in of_mode for run in e.runs])
        for of_mode in zip(*groups, strict=True)
    ]


def title_of(flags: dict[str, Any], model: LayerSkipModel) -> str:
    """What was measured, in a line."""
    kept = f"{model.decoder.dtype_name}, {flags['weights']}"
    return f"{flags['model']}, {kept}, greedy, one prompt at a time"


def table(groups: Sequence[Group], title: str, total: Group | None = None) -> Table:
    """A line a group, and one for all where it is given: plain decoding, auto, how they compare."""
    shown = Table(title=escape(title))
    headings = ("task", "plain tokens/s", "auto tokens/s", "speedup", "acceptance", "identical")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "task" else "right")
    for group in [*groups, *([total] if total else [])]:
        plain, auto = group["rows"]
        same = round(auto["identical_to_plain"] * group["samples"])
        shown.add_row(
            group["task"],
            _figure(plain["tokens_per_s"], "{:.1f}"),
            _figure(auto["tokens_per_s"], "{:.1f}"),
            _figure(auto["speedup"], "{:.2f}x"),
            _figure(auto["acceptance_rate"], "{:.0%}"),
            f"{same} of {group['samples']}",
            end_section=group is groups[-1],
        )
    return shown


def bars(groups: Sequence[Group]) -> Table:
    """Tokens/s of both modes."""
    fastest = max(r["tokens_per_s"] or 0.0 for group in groups for r in group["rows"])
    shown = Table.grid(padding=(0, 1))
    for group in groups:
        for i, figures in enumerate(group["rows"]):
            speed = figures["tokens_per_s"] or 0.0
            shown.add_row(
                "" if i else group["task"],
                figures["mode"],
                Bar(fastest or 1.0, 0, speed, width=40, color=OWN if i else OTHER),
                _figure(figures["tokens_per_s"], "{:.1f} tokens/s"),
            )
    return shown


def _figure(value: float | None, form: str) -> str:
    """A figure, or a stroke where there is none: no second token, or nothing drafted."""
    return "-" if value is None else form.format(value)
