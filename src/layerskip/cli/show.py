"""Answers and their numbers on a terminal."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from layerskip.decoding import Generation, Piece

DRAFTED_STYLE = "green"


def show_pieces(pieces: Iterable[Piece], *, show_draft: bool) -> None:
    """Write an answer to stdout as it arrives, marked by origin where that was asked for."""
    console = _stdout()
    for piece in pieces:
        if not show_draft:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        elif piece.text:
            console.print(_marked(piece.text, piece.drafted, console), end="")
    sys.stdout.write("\n")
    sys.stdout.flush()


def show_legend() -> None:
    """Say on stderr what the marks of `show_pieces` mean."""
    example = _marked("drafted and accepted", True, _stdout())
    Console(stderr=True, highlight=False).print(Text.assemble(example, " · the model's own"))


def _stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _marked(text: str, drafted: bool, console: Console) -> Text:
    """Colour what was drafted, or put it in brackets where there is no colour."""
    if not drafted:
        return Text(text)
    return Text(f"[{text}]") if console.color_system is None else Text(text, DRAFTED_STYLE)


def show_stats(generation: Generation) -> None:
    """One line on stderr: speed, and acceptance where there were rounds."""
    g = generation
    parts = [f"{g.mode}", f"{g.prompt_tokens} + {g.new_tokens} tokens"]
    if g.exit_layer is not None:
        parts[0] += (
            f" (E={g.exit_layer}"
            + ("" if g.draft_tokens is None else f", d={g.draft_tokens}")
            + ")"
        )
    parts.append(f"first token {g.ttft_s * 1e3:.0f} ms")
    if g.tokens_per_s is not None:
        parts.append(f"{g.tokens_per_s:.1f} tokens/s")
    if g.acceptance_rate is not None and g.mean_accepted_length is not None:
        parts.append(f"acceptance {g.acceptance_rate:.0%}")
        parts.append(f"{g.mean_accepted_length:.2f} tokens a round")
    print(" · ".join(parts), file=sys.stderr)
