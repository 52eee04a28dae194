"""Plain decoding and mode auto side by side: answers while they are made, a table, and bars."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.measure import Entry, Setting, measure
from layerskip.bench.report import OTHER, OWN
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.cli.config_flags import ModelConfig
from layerskip.cli.output import DRAFTED_COLOUR, escape_control_chars, shown
from layerskip.decoding import Answer, LayerSkipModel
from layerskip.decoding.prompt import Prompt

MODES = ("plain", "auto")  # from left to right
REFRESH_S = 0.1

Group = dict[str, Any]  # task, samples, and rows, plain decoding's first


def title_of(config: ModelConfig, model: LayerSkipModel) -> str:
    """Return the title of a table."""
    precision = f"{model.decoder.dtype_name}, {config.weights}"
    return f"{config.model}, {precision}, greedy, one prompt at a time"


def group_of(name: str, entries: Sequence[Entry]) -> Group:
    """Return the rows of all modes on some prompts; the first entry is plain decoding."""
    rows = [row(entry, plain=entries[0].runs) for entry in entries]
    return {"task": name, "samples": len(entries[0].runs), "rows": rows}


def show_groups(
    console: Console, groups: Sequence[Group], title: str, total: Group | None = None
) -> None:
    """Print a table of plain decoding and auto, with a line for each group, and bars of the speeds."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    table = Table(title=shown(title))
    headings = ("task", "plain tokens/s", "auto tokens/s", "speedup", "acceptance", "identical")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for group in [*groups, *([total] if total else [])]:
        plain, auto = group["rows"]
        table.add_row(
            group["task"],
            cell(plain["tokens_per_s"], "{:.1f}"),
            cell(auto["tokens_per_s"], "{:.1f}"),
            cell(auto["speedup"], "{:.2f}x"),
            cell(auto["acceptance_rate"], "{:.0%}"),
            f"{round(auto['identical_to_plain'] * group['samples'])} of {group['samples']}",
            end_section=group is groups[-1],
        )
    fastest = max(r["tokens_per_s"] or 0.0 for group in groups for r in group["rows"])
    bars = Table.grid(padding=(0, 1))
    for group in groups:
        for i, figures in enumerate(group["rows"]):
            speed = figures["tokens_per_s"] or 0.0
            bars.add_row(
                "" if i else group["task"],
                figures["mode"],
                Bar(fastest or 1.0, 0, speed, width=40, color=OWN if i else OTHER),
                cell(figures["tokens_per_s"], "{:.1f} tokens/s"),
            )
    console.print(table)
    console.print(bars)


def compare(
    model: LayerSkipModel,
    name: str,
    texts: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    console: Console,
) -> list[Entry]:
    """Answer prompts in both modes, interleaved, and show the answers while they are made.

    Args:
        model: to run.
        name: of the kind of prompts.
        texts: the prompts as they are shown.
        prompts: the prompts for the model.
        max_new_tokens: of each answer.
        console: to show them on.

    Returns:
        An entry for each of `MODES`.
    """
    with SideBySide(console, name, texts) as view:
        system = LayerSkipSystem(model, settings_of(model, modes=MODES), watch=view.watch)
        ids = [model.tokenize(prompt) for prompt in prompts]
        return measure([system], ids, max_new_tokens=max_new_tokens, between=view.toggle)


@dataclasses.dataclass
class _Column:
    """An answer so far."""

    mode: str
    text: Text = dataclasses.field(default_factory=Text)
    tokens_per_s: float | None = None
    finished: bool = False

    @property
    def speed(self) -> str:
        return "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"

    @property
    def panel(self) -> Panel:
        title, speed = (f" {part} " if part else "" for part in (self.mode, self.speed))
        return Panel(self.text, title=title, title_align="left", subtitle=speed)


class SideBySide:
    """A context that shows the answers to each prompt in all modes together.

    Args:
        console: a terminal, whose columns fill as tokens come, or a file.
        name: of the kind of prompts.
        texts: the prompts, in their order.
    """

    def __init__(self, console: Console, name: str, texts: Sequence[str]) -> None:
        self._console, self._name, self._texts = console, name, texts
        self._is_warm, self._shown = False, 0
        self._columns: list[_Column] = []
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
        if not self._is_warm or self._console.quiet:
            return
        if not self._columns:
            self._begin()
        column = self._columns[MODES.index(setting.mode)]
        for piece in answer:
            text = escape_control_chars(piece.text if column.text else piece.text.lstrip("\n"))
            column.text.append(text, DRAFTED_COLOUR if piece.drafted else None)
            if self._live is not None and time.monotonic() - self._drawn_at > REFRESH_S:
                with answer.paused():
                    column.tokens_per_s = answer.generation.tokens_per_s
                    self._draw(self._live)
        column.tokens_per_s, column.finished = answer.generation.tokens_per_s, True
        if self._live is not None:
            self._draw(self._live)
        if all(column.finished for column in self._columns):
            self._end()

    def _begin(self) -> None:
        text = self._texts[self._shown]
        self._shown += 1
        self._columns = [_Column(mode) for mode in MODES]
        self._console.rule(f"{self._name}, {self._shown} of {len(self._texts)}", align="left")
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._console.print(Text(text, "bold"), soft_wrap=not is_live)
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
        self._columns = []
