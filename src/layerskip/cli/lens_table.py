"""The lens on a terminal."""

import math

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from layerskip.cli.show import has_colours
from layerskip.lens import Agreement, Report

CELL = 9  # columns of the terminal that a token may take
MARGIN = 16  # columns of the terminal that layer and agreement take
_AGREES, _DIFFERS, _PAPER = (37, 161, 142), (224, 142, 69), (255, 255, 255)


def show_report(console: Console, report: Report, *, all_positions: bool) -> None:
    """Print the table, the last layer on top, and the rounds where there are any.

    Args:
        console: where to.
        report: what to.
        all_positions: as many tables below one another as it takes, else as much of the answer as one
            table holds.
    """
    positions = report.lens.positions
    start = positions.start if all_positions else report.lens.answer_positions.start
    width = max(1, (console.width - MARGIN) // (CELL + 1))
    n_blocks = math.ceil((positions.stop - start) / width) if all_positions else 1
    for first in range(start, start + n_blocks * width, width):
        console.print(_block(report.part(range(first, first + width)), console))
    shown = range(start, min(start + n_blocks * width, positions.stop))
    console.print(_legend(console))
    if len(shown) < positions.stop - start:
        console.print(
            f"positions {shown[0]} to {shown[-1]} of {positions[0]} to {positions[-1]}"
            " (--positions A-B or all shows others)",
            style="dim",
        )
    console.print(
        f"the answer's {report.agreement.positions} tokens settle at layer"
        f" {report.agreement.mean_settled_layer:.1f} of {report.agreement.exits[-1]} in the mean"
    )
    if report.rounds:
        _show_rounds(console, report)


def show_agreement(console: Console, agreement: Agreement) -> None:
    """Print agreement layer by layer, the last on top."""
    table = Table(title=f"{agreement.prompts} prompts, {agreement.positions} answer tokens")
    for heading in ("layer", "agrees with the last", "settled by then"):
        table.add_column(heading, justify="right")
    rows = zip(agreement.exits, agreement.rates, agreement.settled_by, strict=True)
    for e, rate, settled in reversed(list(rows)):
        table.add_row(str(e), _shaded(f"{rate:7.1%}", rate, _AGREES), f"{settled:.1%}")
    console.print(table)


def _block(report: Report, console: Console) -> Table:
    lens, symbols = report.lens, report.symbols
    agrees, settled = lens.agrees.tolist(), lens.settled
    rates = report.agreement.rate_of
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("agrees", justify="right")
    for position in lens.positions:
        style = "bold" if position >= lens.prompt_tokens else "dim"
        token = _cut(Text(symbols[lens.token_ids[position]], style))
        heading = Text.assemble((f"{position}\n", "dim"), token)
        table.add_column(heading, width=CELL, no_wrap=True)
    for row in reversed(range(len(lens.exits))):
        e = lens.exits[row]
        cells = []
        for column, place in enumerate(settled):
            symbol, p = symbols[int(lens.top_ids[row, column, 0])], lens.best(row, column)[0][1]
            if e >= place and not has_colours(console):
                symbol = f"={symbol}"  # no colour tells it here
            text = _shaded(symbol, p, _AGREES if agrees[row][column] else _DIFFERS)
            if e >= place:
                text.stylize("bold")
            if e == place:
                text.stylize("underline")
            cells.append(text)
        exit_layer = report.rounds and report.generation and report.generation.exit_layer == e
        table.add_row(Text(f"{'E ' if exit_layer else ''}{e}"), f"{rates[e]:.0%}", *cells)
    return table


def _shaded(text: str, p: float, tone: tuple[int, int, int]) -> Text:
    """Black on a tone that is the stronger the higher the probability."""
    mixed = [round(paper + (full - paper) * p) for paper, full in zip(_PAPER, tone, strict=True)]
    background = f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
    return _cut(Text(text, Style(color="black", bgcolor=background)), pad=True)


def _cut(text: Text, pad: bool = False) -> Text:
    text.truncate(CELL, overflow="ellipsis", pad=pad)
    return text


def _legend(console: Console) -> Text:
    if not has_colours(console):
        return Text(
            "= settled: from this layer up the last layer's token, and nothing changes any more"
        )
    return Text.assemble(
        _shaded("as last", 0.8, _AGREES),
        " the last layer's token  ",
        _shaded("other", 0.8, _DIFFERS),
        " another, both by probability  ",
        ("underlined", "bold underline"),
        " settled: from this layer up nothing changes",
    )


def _show_rounds(console: Console, report: Report) -> None:
    assert report.generation is not None
    g, symbols = report.generation, report.symbols
    rate = "" if g.acceptance_rate is None else f" ({g.acceptance_rate:.0%})"
    exit_layer = "" if g.exit_layer is None else f" E={g.exit_layer},"
    console.print(
        f"\n{g.rounds} rounds,{exit_layer} d={g.draft_tokens}, drafts of {report.drafters or 'nobody'}:"
        f" {g.accepted} of {g.drafted} drafted tokens accepted{rate},"
        f" {g.mean_accepted_length:.2f} tokens a round"
    )
    for number, one in enumerate(report.rounds, start=1):
        line = Text(f"{number:4} at {one.position}: ", "dim")
        for token in one.accepted:
            line.append(f"✓{symbols[token]} ", "green")
        for i, token in enumerate(one.rejected):
            line.append(
                f"{'~' if i else '✗'}{symbols[token]} ", "dim strike" if i else "red strike"
            )
        if one.own is not None:
            line.append(f"{'✎' if one.corrected else '+'}{symbols[one.own]}", "bold blue")
        console.print(line, soft_wrap=True)
    console.print(
        "✓ accepted  ✗ wrong  ~ dropped with it  ✎ corrected  + the model's own", style="dim"
    )
