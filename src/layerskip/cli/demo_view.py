"""Plain decoding and `auto` side by side: live in two columns, as lines where no terminal is."""

import dataclasses
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.measure import Entry, Setting, measure
from layerskip.bench.own import OwnSystem, settings_of
from layerskip.cli.show import DRAFTED_COLOUR
from layerskip.cli.terminal import harmless
from layerskip.decoding import Answer, LayerSkipModel
from layerskip.decoding.prompt import Prompt

MODES = ("plain", "auto")  # from left to right
REFRESH_S = 0.1


def compare(
    model: LayerSkipModel,
    name: str,
    texts: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    console: Console,
) -> list[Entry]:
    """Answer all prompts in both modes in turns, and show the answers while they are made.

    Args:
        model: who answers.
        name: of the kind of prompts.
        texts: the prompts as they are shown.
        prompts: as they are asked.
        max_new_tokens: of each answer.
        console: where they are shown.

    Returns:
        What was measured of each of `MODES`.
    """
    with SideBySide(console, name, texts) as view:
        system = OwnSystem(model, settings_of(model, modes=MODES), watch=view.watch)
        return measure(
            [system],
            [model.tokenize(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            between=view.turn,
        )


@dataclasses.dataclass
class _Column:
    """An answer as far as it has come."""

    mode: str
    text: Text = dataclasses.field(default_factory=Text)
    tokens_per_s: float | None = None
    answered: bool = False

    @property
    def speed(self) -> str:
        """In words; nothing before there is one."""
        return "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"

    @property
    def panel(self) -> Panel:
        """The answer in a frame, under its mode and above its speed."""
        title, speed = (f" {part} " if part else "" for part in (self.mode, self.speed))
        return Panel(self.text, title=title, title_align="left", subtitle=speed)


class SideBySide:
    """A context in which answers to some prompts are shown, each prompt's in all modes together.

    Args:
        console: where; on a terminal the columns fill as tokens come.
        name: of the kind of prompts.
        texts: the prompts, in their order.
    """

    def __init__(self, console: Console, name: str, texts: Sequence[str]) -> None:
        self._console, self._name, self._texts = console, name, texts
        self._shows, self._asked = False, 0
        self._columns: list[_Column] = []
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def turn(self) -> None:
        """For `between` of `measure`: what comes before the first call is a warm-up and not shown."""
        self._shows = not self._shows

    def watch(self, setting: Setting, answer: Answer) -> None:
        """For `watch` of `OwnSystem`: compute an answer and show it; drawing takes none of its time."""
        if not self._shows or self._console.quiet:
            return
        if not self._columns:
            self._begin()
        column = self._columns[MODES.index(setting.mode)]
        for piece in answer:
            text = harmless(piece.text if column.text else piece.text.lstrip("\n"))
            column.text.append(text, DRAFTED_COLOUR if piece.drafted else None)
            if self._live is not None and time.monotonic() - self._drawn_at > REFRESH_S:
                with answer.paused():
                    column.tokens_per_s = answer.generation.tokens_per_s
                    self._draw(self._live)
        column.tokens_per_s, column.answered = answer.generation.tokens_per_s, True
        if self._live is not None:
            self._draw(self._live)
        if all(column.answered for column in self._columns):
            self._end()

    def _begin(self) -> None:
        text = self._texts[self._asked]
        self._asked += 1
        self._columns = [_Column(mode) for mode in MODES]
        self._console.rule(f"{self._name}, {self._asked} of {len(self._texts)}", align="left")
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
