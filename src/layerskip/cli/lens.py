"""`layerskip lens`: the predictions of every layer, as a table, a picture, and a page."""

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

from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    config_options,
    exit_layers,
    given,
    model_options,
    parse_range,
)
from layerskip.cli.data import read_prompts
from layerskip.cli.output import (
    check_outputs,
    check_pictures,
    deliver,
    has_colours,
    log_stderr,
    run_all,
    track,
    waiting,
)
from layerskip.decoding import DecodingConfig, Generation, LayerSkipModel, PromptError
from layerskip.decoding.generate import StoppingCriteria
from layerskip.fileio import replace
from layerskip.lens import Agreement, Report, report_on
from layerskip.lens.page import agreement_page, report_page

CELL = 9  # columns of the terminal for a token
MARGIN = 16  # columns of the terminal for layer and agreement
_AGREES, _DIFFERS, _PAPER = (37, 161, 142), (224, 142, 69), (255, 255, 255)


def show_report(console: Console, report: Report, *, all_positions: bool) -> None:
    """Print the table, the last layer on top, and the rounds where there are any.

    Args:
        console: of the output.
        report: to print.
        all_positions: print as many tables as it takes, else as much of the answer as one table
            holds.
    """
    positions = report.lens.positions
    start = positions.start if all_positions else report.lens.answer_positions.start
    width = max(1, (console.width - MARGIN) // (CELL + 1))
    n_blocks = math.ceil((positions.stop - start) / width) if all_positions else 1
    for first in range(start, start + n_blocks * width, width):
        console.print(_block(report.part(range(first, first + width)), console))
    visible = range(start, min(start + n_blocks * width, positions.stop))
    console.print(_legend(console))
    if len(visible) < positions.stop - start:
        console.print(
            f"positions {visible[0]} to {visible[-1]} of {positions[0]} to {positions[-1]}"
            " (--positions A-B or all shows others)",
            style="dim",
        )
    console.print(
        f"the answer's {report.agreement.positions} tokens are saturated from layer"
        f" {report.agreement.mean_saturation_layer:.1f} of {report.agreement.exits[-1]} in the mean"
    )
    if report.rounds:
        _show_rounds(console, report)


def show_agreement(console: Console, agreement: Agreement) -> None:
    """Print agreement layer by layer, the last on top."""
    table = Table(title=f"{agreement.prompts} prompts, {agreement.positions} answer tokens")
    for heading in ("layer", "agrees with the last", "saturated by then"):
        table.add_column(heading, justify="right")
    rows = zip(agreement.exits, agreement.rates, agreement.saturated_by, strict=True)
    for e, rate, saturated in reversed(list(rows)):
        table.add_row(str(e), _shaded(f"{rate:7.1%}", rate, _AGREES), f"{saturated:.1%}")
    console.print(table)


def _block(report: Report, console: Console) -> Table:
    lens, symbols = report.lens, report.symbols
    agrees, saturated = lens.agrees.tolist(), lens.saturation_layers
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
        for column, saturation_layer in enumerate(saturated):
            symbol, p = symbols[int(lens.top_ids[row, column, 0])], lens.best(row, column)[0][1]
            if e >= saturation_layer and not has_colours(console):
                symbol = f"={symbol}"  # no colour shows it here
            text = _shaded(symbol, p, _AGREES if agrees[row][column] else _DIFFERS)
            if e >= saturation_layer:
                text.stylize("bold")
            if e == saturation_layer:
                text.stylize("underline")
            cells.append(text)
        exit_layer = report.rounds and report.generation and report.generation.exit_layer == e
        table.add_row(Text(f"{'E ' if exit_layer else ''}{e}"), f"{rates[e]:.0%}", *cells)
    return table


def _shaded(text: str, p: float, tone: tuple[int, int, int]) -> Text:
    """Return black text on a tone that grows with the probability."""
    mixed = [round(paper + (full - paper) * p) for paper, full in zip(_PAPER, tone, strict=True)]
    background = f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
    return _cut(Text(text, Style(color="black", bgcolor=background)), pad=True)


def _cut(text: Text, pad: bool = False) -> Text:
    text.truncate(CELL, overflow="ellipsis", pad=pad)
    return text


def _legend(console: Console) -> Text:
    if not has_colours(console):
        return Text(
            "= saturated: from this layer up the last layer's token, and nothing changes any more"
        )
    return Text.assemble(
        _shaded("as last", 0.8, _AGREES),
        " the last layer's token  ",
        _shaded("other", 0.8, _DIFFERS),
        " another, both by probability  ",
        ("underlined", "bold underline"),
        " saturated: from this layer up nothing changes",
    )


def _show_rounds(console: Console, report: Report) -> None:
    assert report.generation is not None
    g, symbols = report.generation, report.symbols
    rate = "" if g.acceptance_rate is None else f" ({g.acceptance_rate:.0%})"
    exit_layer = "" if g.exit_layer is None else f" E={g.exit_layer},"
    drafters = report.drafters or "no drafter"
    console.print(
        f"\n{g.rounds} rounds,{exit_layer} d={g.draft_tokens}, drafts of {drafters}:"
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


PROMPT_TAIL = 16  # positions of the prompt to look at, unless positions are given
PICTURE_POSITIONS = 16
_DECODING = ("mode", "exit_layer", "draft_tokens", "draft_from", "adaptive", "max_new_tokens")
_MAX_NEW_TOKENS = 32

_file_type = click.Path(dir_okay=False, path_type=Path)


def _positions(_: click.Context, __: click.Parameter, value: str | None) -> range | None:
    """Read `all`, or first and last position such as 10-30 (a click callback)."""
    if value is None:
        return None
    first, last = (1, sys.maxsize - 1) if value == "all" else parse_range(value)
    if not 1 <= first <= last:
        raise click.BadParameter(f"{value!r} is neither 'all' nor positions such as 10-30")
    return range(first, last + 1)


@click.command("lens")
@click.option(
    "--prompt", metavar="TEXT", help="The prompt; without it standard input is one prompt."
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='File of prompts, for agreement by layer: .jsonl with a field "prompt" or "messages", else'
    " one prompt a line.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Number of prompts of --data."
)
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@click.option(
    "--continuation", metavar="TEXT", help="Look at this text after the prompt, not at an answer."
)
@click.option(
    "--layers", callback=exit_layers, metavar="4,8,12-20", help="Exit layers. Default: all."
)
@click.option(
    "--positions",
    callback=_positions,
    metavar="A-B|all",
    help="Positions of the text, from 1: the prompt's first token, 0, is predicted by nothing."
    " Default: the answer, and on the terminal and in the picture as much of it as fits.",
)
@click.option("--png", type=_file_type, metavar="FILE", help="Draw the picture to a file.")
@click.option(
    "--html", type=_file_type, metavar="FILE", help="Write a page that needs no network to a file."
)
@config_options(DecodingConfig, only=_DECODING, max_new_tokens=_MAX_NEW_TOKENS)
@model_options
@common_options
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
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Show what every layer would predict at each position of an answer.

    A layer's prediction is what early exit after it would choose: the final norm and the head, applied
    to its output. A position is saturated at the layer from which on the prediction stays the same. With
    --data: how often each layer agrees with the last one, over the answers to all prompts. With --mode
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
    decoding = config_from_flags(DecodingConfig, flags, max_new_tokens=_MAX_NEW_TOKENS)
    model_config = config_from_flags(ModelConfig, flags)
    if continuation is not None and (idle := given(_DECODING)):
        raise click.UsageError(f"--continuation is the answer; {idle[0]} would have no effect")
    name = model_config.model
    check_outputs({"--output": output, "--png": png, "--html": html}, beside=(name, data))
    if png is not None:
        check_pictures("--png")
    prompts = read_prompts(prompt, data, "--data", chat=chat)[:samples]
    model = config_flags.load_model(model_config)
    console = Console(highlight=False, quiet=as_json)
    error: BaseException | None = None
    if data is None:
        with waiting("running all layers"):
            report = _look(model, name, prompts[0], continuation, layers, positions, decoding)
        document = report.to_dict()
    else:
        agreement, error = _agreement(model, prompts, layers, decoding)
        document = {
            "model": name,
            "agreement": agreement.to_dict(),
            "interrupted": error is not None,
        }

    def draw() -> None:
        if png is None:
            return
        from layerskip.lens.report import draw_agreement, draw_report

        if data is None:
            picture = draw_report(report if positions else _head(report))
        else:
            picture = draw_agreement(agreement, name)
        replace(png, picture)

    def write_page() -> None:
        if html is not None:
            page = report_page(report) if data is None else agreement_page(agreement, name)
            replace(html, page.encode())

    def show() -> None:
        if data is None:
            show_report(console, report, all_positions=positions is not None)
        else:
            show_agreement(console, agreement)

    run_all(
        draw,
        write_page,
        lambda: deliver(document, as_json=as_json, output=output),
        show,
    )
    if error is not None:
        raise error


def _look(
    model: LayerSkipModel,
    name: str,
    prompt: Any,
    continuation: str | None,
    layers: list[int] | None,
    positions: range | None,
    decoding: DecodingConfig,
) -> Report:
    answer: Generation | list[int]
    capacity = None
    if continuation is None:
        running = model.answer(prompt, decoding)
        ids, answer = list(running.prompt), running.complete()
        # Of the same size as in the answer: some rotary embeddings depend on it.
        capacity = StoppingCriteria.of(model.decoder, ids, decoding.max_new_tokens).capacity
    else:
        ids = model.tokenize(prompt)
        answer = _continuation_ids(model.tokenizer, prompt, ids, continuation)
    start = len(ids) - PROMPT_TAIL if positions is None else min(positions.start, len(ids))
    report = report_on(
        model, name, ids, answer, exits=layers, start=max(start, 1), capacity=capacity
    )
    return report if positions is None else report.part(positions)


def _continuation_ids(tokenizer: Any, prompt: Any, ids: list[int], text: str) -> list[int]:
    """Return token ids of a text after a prompt: SentencePiece puts a space before a first word."""
    try:
        if isinstance(prompt, str):
            whole: list[int] = tokenizer.encode(prompt + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        line, alone, after_line = (
            tokenizer.encode(words, add_special_tokens=False) for words in ("\n", text, f"\n{text}")
        )
    except (TypeError, UnicodeError) as error:  # such as a lone surrogate
        raise ValueError(f"the continuation cannot be tokenized: {error}") from error
    return after_line[len(line) :] if after_line[: len(line)] == line else alone


def _head(report: Report) -> Report:
    """Return the beginning of the answer, for a picture of common size."""
    start = report.lens.prompt_tokens
    return report.part(range(start, start + PICTURE_POSITIONS))


def _agreement(
    model: LayerSkipModel, prompts: list[Any], layers: list[int] | None, decoding: DecodingConfig
) -> tuple[Agreement, BaseException | None]:
    """Return the agreement over all prompts, or over those before an error, with the error."""
    results, left_out, ended = list[Agreement](), list[PromptError](), None
    try:
        for prompt in track(prompts, "running all layers"):
            try:
                results.append(_look(model, "", prompt, None, layers, None, decoding).agreement)
            except PromptError as error:
                if len(prompts) == 1:
                    raise
                left_out.append(error)
    except (KeyboardInterrupt, Exception) as error:
        if not results:
            raise
        ended = error
    if not results:
        raise ValueError(f"none of these prompts can be answered; the last: {left_out[-1]}")
    if left_out:
        log_stderr(f"{len(left_out)} prompts were left out; the last: {left_out[-1]}")
    return functools.reduce(operator.add, results), ended
