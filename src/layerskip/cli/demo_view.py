"""Plain decoding and mode auto side by side: answers while they are made, their record, and a table."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.measure import Entry, Setting, measure
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem
from layerskip.cli.output import escape_control_chars, shown
from layerskip.decoding import Answer, LayerSkipModel
from layerskip.decoding.prompt import Prompt

MODES = ("plain", "auto")  # from left to right
REFRESH_S = 0.1
# The origin of a token -> its style; without colours bold and underlined remain.
STYLES = {
    "early-exit": "bold green",
    "exit-adapter": "bold green",
    "n-gram": "underline cyan",
    "datastore": "underline cyan",
    "prediction": "underline magenta",
}
NAMES = {
    "early-exit": "early exit",
    "exit-adapter": "exit adapter",
    "n-gram": "n-gram of prompt and answer",
    "datastore": "datastore",
    "prediction": "predicted output",
}

Group = dict[str, Any]  # task, samples, and rows, plain decoding's first


@dataclasses.dataclass(frozen=True)
class Frame:
    """A piece of an answer: seconds since its beginning, text, and origin ("model" or a drafter)."""

    at_s: float
    text: str
    source: str


@dataclasses.dataclass
class Column:
    """An answer so far."""

    mode: str
    frames: list[Frame] = dataclasses.field(default_factory=list)
    tokens_per_s: float | None = None
    finished: bool = False

    @property
    def text(self) -> Text:
        """The answer, styled by origin."""
        styled = ((frame.text, STYLES.get(frame.source, "")) for frame in self.frames)
        return Text.assemble(*styled, overflow="fold")

    @property
    def speed(self) -> str:
        """Its speed, as far as there is one."""
        return "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"

    @property
    def panel(self) -> Panel:
        """The answer in a frame."""
        title, speed = (f" {part} " if part else "" for part in (self.mode, self.speed))
        return Panel(self.text, title=title, title_align="left", subtitle=speed)


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt and its answers in `MODES`, with the time of each piece."""

    prompt: str
    columns: tuple[Column, ...]


def group_of(name: str, entries: Sequence[Entry]) -> Group:
    """Return the rows of all modes on some prompts; the first entry is plain decoding."""
    rows = [row(entry, plain=entries[0].runs) for entry in entries]
    return {"task": name, "samples": len(entries[0].runs), "rows": rows}


def cell(value: float | None, form: str) -> str:
    """Format a figure of a table, or its absence."""
    return "-" if value is None else form.format(value)


def identical(figures: dict[str, Any], samples: int) -> str:
    """Return how many answers of a row equal those of plain decoding."""
    return f"{round(figures['identical_to_plain'] * samples)} of {samples}"


def show_groups(console: Console, groups: Sequence[Group], title: str) -> None:
    """Print a table of plain decoding and auto, with a line for each group."""
    table = Table(title=shown(title))
    headings = ("scene", "plain tokens/s", "auto tokens/s", "speedup", "acceptance", "identical")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scene" else "right")
    for group in groups:
        plain, auto = group["rows"]
        table.add_row(
            group["task"],
            cell(plain["tokens_per_s"], "{:.1f}"),
            cell(auto["tokens_per_s"], "{:.1f}"),
            cell(auto["speedup"], "{:.2f}x"),
            cell(auto["acceptance_rate"], "{:.0%}"),
            identical(auto, group["samples"]),
        )
    console.print(table)


def show_legend(console: Console, records: Sequence[Record]) -> None:
    """Explain the styles of those origins that answers have."""
    sources = {f.source for record in records for column in record.columns for f in column.frames}
    parts = [Text(NAMES[source], style) for source, style in STYLES.items() if source in sources]
    if parts:
        legend = Text(", ").join([*parts, Text("the model's own token")])
        console.print(Text.assemble("Tokens: ", legend))


def compare(
    model: LayerSkipModel,
    name: str,
    texts: Sequence[str],
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    *,
    max_new_tokens: int,
    console: Console,
) -> tuple[list[Entry], list[Record]]:
    """Answer prompts in all settings, interleaved, and show the answers while they are made.

    Args:
        model: to run.
        name: of the kind of prompts.
        texts: the first prompts as they are shown; of further ones nothing is.
        prompts: the prompts for the model.
        settings: plain decoding and auto, which are shown, and others.
        max_new_tokens: of each answer.
        console: to show them on.

    Returns:
        An entry for each setting, and a record of what was shown.
    """
    with SideBySide(console, name, texts) as view:
        system = LayerSkipSystem(model, settings, watch=view.watch)
        ids = [model.tokenize(prompt) for prompt in prompts]
        entries = measure([system], ids, max_new_tokens=max_new_tokens, between=view.toggle)
    return entries, view.records


class SideBySide:
    """A context that shows the answers to each prompt in both modes together.

    Args:
        console: a terminal, whose columns fill as tokens come, or a file.
        name: of the kind of prompts.
        texts: the prompts that are shown, in their order.

    Attributes:
        records: of the prompts that both modes have answered.
    """

    def __init__(self, console: Console, name: str, texts: Sequence[str]) -> None:
        self.records: list[Record] = []
        self._console, self._name, self._texts = console, name, texts
        self._is_warm = False
        self._columns: list[Column] = []
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def toggle(self) -> None:
        """Start or stop showing (`between` of `measure`): the warm-up is not shown."""
        self._is_warm = not self._is_warm

    def watch(self, setting: Setting, answer: Answer) -> None:
        """Compute an answer and show it (`watch` of `LayerSkipSystem`); drawing is not timed."""
        is_shown = self._is_warm and len(self.records) < len(self._texts)
        if not is_shown or setting.label is not None:
            return
        if not self._columns:
            self._begin()
        column = self._columns[MODES.index(setting.mode)]
        for piece in answer:
            with answer.paused():
                text = escape_control_chars(
                    piece.text if column.frames else piece.text.lstrip("\n")
                )
                so_far = answer.generation
                at_s = so_far.ttft_s + so_far.decode_s
                column.frames.append(Frame(at_s, text, piece.source))
                if self._live is not None and time.monotonic() - self._drawn_at > REFRESH_S:
                    column.tokens_per_s = so_far.tokens_per_s
                    self._draw(self._live)
        column.tokens_per_s, column.finished = answer.generation.tokens_per_s, True
        if self._live is not None:
            self._draw(self._live)
        if all(column.finished for column in self._columns):
            self._end()

    def _begin(self) -> None:
        number = len(self.records)
        self._columns = [Column(mode) for mode in MODES]
        self._console.rule(f"{self._name}, {number + 1} of {len(self._texts)}", align="left")
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._console.print(Text(self._texts[number], "bold"), soft_wrap=not is_live)
        if is_live:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def _draw(self, live: Live) -> None:
        grid = Table.grid(expand=True)
        for _ in self._columns:
            grid.add_column(ratio=1)
        grid.add_row(*(column.panel for column in self._columns))
        live.update(grid, refresh=True)
        self._drawn_at = time.monotonic()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        else:
            for column in self._columns:
                heading = ", ".join(filter(None, (column.mode, column.speed)))
                line = Text.assemble((f"[{heading}] ", "dim"), column.text.plain.strip())
                self._console.print(line, soft_wrap=True)
        self.records.append(Record(self._texts[len(self.records)], tuple(self._columns)))
        self._columns = []
