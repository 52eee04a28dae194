"""Answers and their numbers on a terminal."""

import sys
from collections.abc import Iterable

import click
from rich.console import Console

from layerskip.cli.output import escape_control_chars
from layerskip.decoding import Generation, Piece

DRAFTED_COLOUR = "green"


def show_pieces(pieces: Iterable[Piece], *, show_draft: bool, as_ids: bool = False) -> None:
    """Write an answer to stdout as it arrives, marked by origin where that was asked for.

    Where there is no tokenizer, and so no text, `as_ids` writes token ids.
    """
    coloured = show_draft and has_colours(Console())
    is_seen = sys.stdout.isatty()
    for piece in pieces:
        text = f"{piece.token_id} " if as_ids and piece.token_id is not None else piece.text
        text = escape_control_chars(text) if is_seen else text
        marked = show_draft and piece.drafted and text
        sys.stdout.write(_marked(text, coloured) if marked else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def show_legend() -> None:
    """Say on stderr what the marks of `show_pieces` mean."""
    click.echo(
        f"{_marked('drafted and accepted', has_colours(Console()))} · the model's own", err=True
    )


def has_colours(console: Console) -> bool:
    """Whether colours are seen there: it is a terminal that has them, and NO_COLOR is not set."""
    old = console.legacy_windows  # which shows them to what writes through rich alone
    return console.color_system is not None and not (console.no_color or old)


def _marked(text: str, coloured: bool) -> str:
    """What was drafted in colour, or in brackets where there is none; tabs and all stay as they are."""
    return click.style(text, fg=DRAFTED_COLOUR) if coloured else f"[{text}]"


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
