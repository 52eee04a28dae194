"""An animated SVG of recorded answers: plain decoding and auto side by side, one prompt after another.

SMIL animates it, without a script, so that it runs where an image may not have one. All times are those
of the record, slowed down by a factor that the picture names. Viewers without animation show the first
prompt with its whole answers.
"""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from layerskip.cli.demo_view import NAMES, Column, Frame, Record

PLAY_S, HOLD_S = 6.0, 2.5  # of each prompt: its slower answer, and the end result
_COLUMNS = 52  # characters of a line
_LINE, _CHARACTER = 18, 7.5  # size in pixels
_MARGIN, _GAP, _TOP = 20, 20, 112
_CARD = round(_COLUMNS * _CHARACTER) + 24
_WIDTH = 2 * (_MARGIN + _CARD) + _GAP
_CLASSES = {
    "early-exit": "exit",
    "exit-adapter": "exit",
    "n-gram": "lookup",
    "datastore": "lookup",
    "prediction": "prediction",
}
_STYLE = """
svg { color-scheme: light dark }
text { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
       fill: #1f2328; white-space: pre }
.title { font: bold 16px system-ui, sans-serif }
.muted { fill: #59636e } .fast { font-weight: bold; fill: #1a7f37 }
.page { fill: #ffffff } .card { fill: #f6f8fa; stroke: #d1d9e0 }
.exit { fill: #1a7f37 } .lookup { fill: #0969da } .prediction { fill: #8250df }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .muted { fill: #9198a1 } .fast { fill: #3fb950 }
  .page { fill: #0d1117 } .card { fill: #161b22; stroke: #3d444d }
  .exit { fill: #3fb950 } .lookup { fill: #58a6ff } .prediction { fill: #bc8cff }
}
"""


@dataclass(frozen=True)
class Panel:
    """A prompt of the picture: a line above it, and the record."""

    title: str
    record: Record

    @property
    def speedup(self) -> float | None:
        """Tokens/s of auto over those of plain decoding."""
        plain, auto = (column.tokens_per_s for column in self.record.columns)
        return auto / plain if plain and auto else None


def animation(panels: Sequence[Panel]) -> str:
    """Return the SVG file."""
    duration_s = len(panels) * (PLAY_S + HOLD_S)
    lines = max(len(_wrapped(c)) for panel in panels for c in panel.record.columns)
    height = _TOP + lines * _LINE + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>Plain decoding and mode auto answer the same prompts side by side</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}" rx="8"/>',
    ]
    for i, panel in enumerate(panels):
        start_s = i * (PLAY_S + HOLD_S)
        parts += [
            f'<g opacity="{0 if i else 1}">',
            _visible(start_s, start_s + PLAY_S + HOLD_S, duration_s),
            *_scene(panel, start_s, duration_s, height),
            "</g>",
        ]
    return "\n".join([*parts, "</svg>\n"])


def _scene(panel: Panel, start_s: float, duration_s: float, height: int) -> Iterator[str]:
    """Yield the elements of one prompt, both answers in real proportion of their times."""
    columns = panel.record.columns
    slowest_s = max(column.frames[-1].at_s for column in columns)
    scale = PLAY_S / slowest_s
    end_s = start_s + PLAY_S + HOLD_S
    yield _text(_MARGIN, 32, panel.title, "title")
    prompt = textwrap.shorten(panel.record.prompt, 2 * _COLUMNS, placeholder=" ...")
    yield _text(_MARGIN, 58, prompt, "muted")
    for i, column in enumerate(columns):
        left = _MARGIN + i * (_CARD + _GAP)
        yield (
            f'<rect class="card" x="{left}" y="72" width="{_CARD}" height="{height - 116}" rx="6"/>'
        )
        yield _text(left + 12, 93, column.mode, "muted")
        gain = f", {panel.speedup:.1f}x" if i and panel.speedup is not None else ""
        done = "<g>" + _visible(start_s + scale * column.frames[-1].at_s, end_s, duration_s)
        at = left + _CARD - 12
        style = "fast" if i else "muted"
        yield done + _text(at, 93, f"{column.speed}{gain}", style, anchor="end") + "</g>"
        for at_s, chunks in itertools.groupby(_chunks(column), key=lambda chunk: chunk.at_s):
            yield "<g>" + _visible(start_s + scale * at_s, end_s, duration_s)
            for chunk in chunks:
                x = left + 12 + chunk.column * _CHARACTER
                y = _TOP + (chunk.line + 0.4) * _LINE
                width = len(chunk.text) * _CHARACTER
                yield _text(x, y, chunk.text, _CLASSES.get(chunk.source, ""), width=width)
            yield "</g>"
    sources = {frame.source for column in columns for frame in column.frames}
    spans = [
        f'<tspan class="{name}">{NAMES[source]}</tspan>'
        for source, name in _CLASSES.items()
        if source in sources
    ]
    drafts = f"drafts: {', '.join(spans)} · " if spans else ""
    pace = f"{scale:.0f} times slower than real time" if scale >= 1.5 else "in real time"
    yield f'<text class="muted" x="{_MARGIN}" y="{height - 16}">{drafts}{pace}</text>'


@dataclass(frozen=True)
class _Chunk:
    """Text of one step and origin within a line, and its place in characters."""

    at_s: float
    source: str
    line: int
    column: int
    text: str


def _wrapped(column: Column) -> list[str]:
    """Return the lines of an answer; joined they are its text, so that places can be counted."""
    lines: list[str] = []
    for paragraph in "".join(frame.text for frame in column.frames).splitlines(keepends=True):
        rest = paragraph
        while len(rest.rstrip("\n")) > _COLUMNS:
            cut = rest.rfind(" ", 0, _COLUMNS + 1) + 1 or _COLUMNS
            lines.append(rest[:cut])
            rest = rest[cut:]
        lines.append(rest)
    return lines


def _chunks(column: Column) -> Iterator[_Chunk]:
    """Yield an answer's chunks in the order of time."""
    letters = (
        (line, at, letter)
        for line, text in enumerate(_wrapped(column))
        for at, letter in enumerate(text)
    )

    def place(frame: Frame) -> Iterator[tuple[tuple[float, str, int], int, str]]:
        for line, at, letter in itertools.islice(letters, len(frame.text)):
            yield (frame.at_s, frame.source, line), at, letter

    placed = itertools.chain.from_iterable(map(place, column.frames))
    for (at_s, source, line), group in itertools.groupby(placed, key=lambda item: item[0]):
        items = list(group)
        text = "".join(letter for _, _, letter in items).rstrip("\n")
        if text.strip():
            yield _Chunk(at_s, source, line, items[0][1], text)


def _visible(start_s: float, end_s: float, duration_s: float) -> str:
    """Return an animation that shows its element from one time to another of each round."""
    begin, end = start_s / duration_s, end_s / duration_s
    values, times = ["1", "0"], ["0", f"{end:.4f}"]
    if begin > 0:
        values, times = ["0", *values], ["0", f"{begin:.4f}", times[1]]
    if end >= 1:
        values, times = values[:-1], times[:-1]
    if len(values) == 1:  # always
        return ""
    return (
        f'<animate attributeName="opacity" calcMode="discrete" values="{";".join(values)}"'
        f' keyTimes="{";".join(times)}" dur="{duration_s:g}s" repeatCount="indefinite"/>'
    )


def _text(
    x: float, y: float, text: str, style: str, *, width: float | None = None, anchor: str = "start"
) -> str:
    """Return a text; a width keeps letters in their places whatever the font is."""
    length = "" if width is None else f' textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:g}" y="{y:g}"{side}{length}>{escape(text, quote=False)}</text>'
