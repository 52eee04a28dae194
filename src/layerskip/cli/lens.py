"""`layerskip lens`: what every layer would have said, as a table, a picture, and a page."""

import contextlib
import functools
import operator
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layerskip.cli import lens_table, options, outputs, values
from layerskip.cli.progress import track
from layerskip.cli.prompts import asked_prompts
from layerskip.cli.terminal import tell
from layerskip.decoding import Generation, LayerSkipModel, PromptError
from layerskip.decoding.step import Ending
from layerskip.lens import Agreement, Report, report_on
from layerskip.lens.page import agreement_page, report_page
from layerskip.model.files.writing import replace

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
            show = functools.partial(lens_table.show_report, all_positions=positions is not None)
            told.callback(show, console, report)
        else:
            told.callback(lens_table.show_agreement, console, agreement)
        told.callback(outputs.deliver, document, as_json=as_json, output=output)
        if html is not None:
            page = report_page(report) if data is None else agreement_page(agreement, name)
            told.callback(replace, html, page.encode())
        if png is not None:
            from layerskip.lens.picture import draw_agreement, draw_report

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
        tell(f"{len(left_out)} prompts were left out; the last: {left_out[-1]}")
    return functools.reduce(operator.add, found), ended
