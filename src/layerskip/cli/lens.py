"""`layerskip lens`: what every layer would have said, as a table, a picture, and a page."""

import contextlib
import functools
import math
import operator
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli.output import log_stderr, track
from layerskip.cli.prompts import asked_prompts
from layerskip.cli.show import has_colours
from layerskip.decoding import Generation, LayerSkipModel, PromptError
from layerskip.decoding.step import Ending
from layerskip.fileio import replace
from layerskip.lens import Agreement, Report, report_on
from layerskip.lens.page import agreement_page, report_page

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


PROMPT_TAIL = 16  # positions of the prompt that are looked at where none were asked for
PICTURE_POSITIONS = 16
_DECODING = ("mode", "exit_layer", "draft_tokens", "draft_from", "adaptive")

_file_type = click.Path(dir_okay=False, path_type=Path)


def _positions(_: click.Context, __: click.Parameter, value: str | None) -> range | None:
    """`all`, or the first and the last, such as 10-30."""
    if value is None:
        return None
    first, last = (1, sys.maxsize - 1) if value == "all" else values.span(value)
    if not 1 <= first <= last:
        raise click.BadParameter(f"{value!r} is neither 'all' nor positions such as 10-30")
    return range(first, last + 1)


@click.command("lens")
@click.option("--prompt", help="The prompt; without it, standard input is one prompt.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='A file of prompts, for agreement layer by layer: .jsonl with a field "prompt" or'
    ' "messages", else one prompt a line.',
)
@click.option("--samples", type=click.IntRange(min=1), help="Only the first prompts of --data.")
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@click.option("--continuation", help="Look at this text after the prompt, not at an answer.")
@click.option(
    "--layers",
    callback=values.layers,
    metavar="4,8,12-20",
    help="Exit layers. Default: all.",
)
@click.option(
    "--positions",
    callback=_positions,
    metavar="A-B|all",
    help="Positions of the text, from 1: the prompt's first token, 0, is predicted by nothing."
    " Default: the answer, and on the terminal and in the picture as much of it as fits.",
)
@click.option("--png", type=_file_type, help="Draw the picture to a file.")
@click.option("--html", type=_file_type, help="Write the page, which needs no network, to a file.")
@options.mode_options
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N"
)
@options.model_options
@options.common_options
def command(
    prompt: str | None,
    data: Path | None,
    samples: int | None,
    chat: bool,
    continuation: str | None,
    layers: list[int] | None,
    positions: range | None,
    png: Path | None,
    html: Path | None,
    max_new_tokens: int,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Show what every layer would have said at each position of an answer.

    A layer's word is what early exit there would say: the final norm and the head, applied after that
    layer. A position is settled at the layer from which on nothing changes any more. With --data: how
    often each layer agrees with the last one, over the answers to all prompts. With --mode
    self-speculative also the rounds: drafted, accepted, corrected. Answers are greedy.

    \b
    Examples:
      layerskip lens --prompt "The capital of France is" --max-new-tokens 12
      layerskip lens --prompt "def fib(n):" --layers 10,20-30 --positions 4-20 --png lens.png
      layerskip lens --chat --prompt "Name three rivers." --mode self-speculative \\
          --exit-layer 4 --draft-tokens 3 --html lens.html
      layerskip lens --data prompts.jsonl --samples 20 --png agreement.png --output lens.json
    """
    if data is not None and not (prompt is None and continuation is None and positions is None):
        raise click.UsageError("--data excludes --prompt, --continuation, and --positions")
    if samples is not None and data is None:
        raise click.UsageError("--samples needs --data")
    values.check_decoding(flags)
    idle = options.given((*_DECODING, "max_new_tokens"))
    if continuation is not None and idle:
        raise click.UsageError(f"--continuation is the answer; {idle[0]} would have no effect")
    files = {"--output": output, "--png": png, "--html": html}
    outputs.check_outputs(files, beside=(flags["model"], data))
    if png is not None:
        outputs.check_pictures("--png")
    prompts = asked_prompts(prompt, data, "--data", chat=chat)[:samples]
    model = options.load_model(flags)
    decoding = {name: flags[name] for name in _DECODING} | {"max_new_tokens": max_new_tokens}
    name = flags["model"]
    console = Console(highlight=False, quiet=as_json)
    ended: BaseException | None = None
    if data is None:
        with options.waiting("looking"):
            report = _look(model, name, prompts[0], continuation, layers, positions, decoding)
        document = report.to_dict()
    else:
        agreement, ended = _agreement(model, prompts, layers, decoding)
        document = {
            "model": name,
            "agreement": agreement.to_dict(),
            "interrupted": ended is not None,
        }
    with contextlib.ExitStack() as told:  # backwards, and each where another cannot be written
        if data is None:
            show = functools.partial(show_report, all_positions=positions is not None)
            told.callback(show, console, report)
        else:
            told.callback(show_agreement, console, agreement)
        told.callback(outputs.deliver, document, as_json=as_json, output=output)
        if html is not None:
            page = report_page(report) if data is None else agreement_page(agreement, name)
            told.callback(replace, html, page.encode())
        if png is not None:
            from layerskip.lens.report import draw_agreement, draw_report

            if data is None:
                drawn = draw_report(report if positions else _head(report))
            else:
                drawn = draw_agreement(agreement, name)
            replace(png, drawn)
    if ended is not None:
        raise ended


def _look(
    model: LayerSkipModel,
    name: str,
    prompt: Any,
    continuation: str | None,
    layers: list[int] | None,
    positions: range | None,
    decoding: dict[str, Any],
) -> Report:
    answer: Generation | list[int]
    capacity = None
    if continuation is None:
        made = model.answer(prompt, **decoding)
        ids, answer = list(made.prompt), made.complete()
        # As it was answered with.
        capacity = Ending.of(model.decoder, ids, decoding["max_new_tokens"]).capacity
    else:
        ids = model.tokenize(prompt)
        answer = _behind(model.tokenizer, prompt, ids, continuation)
    start = len(ids) - PROMPT_TAIL if positions is None else min(positions.start, len(ids))
    how: dict[str, Any] = {"exits": layers, "start": max(start, 1), "capacity": capacity}
    report = report_on(model, name, ids, answer, **how)
    return report if positions is None else report.part(positions)


def _behind(tokenizer: Any, prompt: Any, ids: list[int], text: str) -> list[int]:
    """Token ids of a text behind a prompt: SentencePiece puts a space before a first word."""
    try:
        if isinstance(prompt, str):
            whole: list[int] = tokenizer.encode(prompt + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        line, alone, behind = (
            tokenizer.encode(words, add_special_tokens=False) for words in ("\n", text, f"\n{text}")
        )
    except (TypeError, UnicodeError) as error:  # such as half of an emoji
        raise ValueError(f"the continuation cannot be made tokens of: {error}") from error
    return behind[len(line) :] if behind[: len(line)] == line else alone


def _head(report: Report) -> Report:
    """As much of the answer as makes a picture of a common size."""
    start = report.lens.prompt_tokens
    return report.part(range(start, start + PICTURE_POSITIONS))


def _agreement(
    model: LayerSkipModel, prompts: list[Any], layers: list[int] | None, decoding: dict[str, Any]
) -> tuple[Agreement, BaseException | None]:
    """Over all prompts, or over those before Ctrl-C or an error, which then comes with it."""
    found, left_out, ended = list[Agreement](), list[PromptError](), None
    try:
        for prompt in track(prompts, "looking"):
            try:
                found.append(_look(model, "", prompt, None, layers, None, decoding).agreement)
            except PromptError as error:
                if len(prompts) == 1:
                    raise
                left_out.append(error)
    except (KeyboardInterrupt, Exception) as error:
        if not found:
            raise
        ended = error
    if not found:
        raise ValueError(f"none of these prompts can be answered; the last: {left_out[-1]}")
    if left_out:
        log_stderr(f"{len(left_out)} prompts were left out; the last: {left_out[-1]}")
    return functools.reduce(operator.add, found), ended
