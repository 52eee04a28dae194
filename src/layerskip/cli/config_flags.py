"""Flags that several commands share, and what they stand for."""

import contextlib
import functools
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from layerskip.cli import output as machine
from layerskip.cli.output import escape_control_chars, log_stderr
from layerskip.data.readers import read_text_file
from layerskip.decoding import DRAFT_SOURCES, MODES, Generation, LayerSkipModel
from layerskip.decoding.placement import DTYPES, device_of
from layerskip.decoding.policy import check_options
from layerskip.model.checkpoint import DRAFT_TEXT_FILE
from layerskip.model.hub import BUILTIN_MODELS, DEFAULT_MODEL, is_pulled, pull
from layerskip.model.quantize import WEIGHTS

_DRAFT_TEXT_FILE = "layerskip.draft_text_file"


def check_decoding(flags: dict[str, Any]) -> None:
    """Refuse flags of decoding that contradict each other whatever the model is, before it is loaded."""
    names = inspect.signature(check_options).parameters
    given: dict[str, Any] = {name: flags.get(name) for name in names}
    try:
        check_options(**given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """A callback that reads layers such as 4,8,12-20; ascending, each once."""
    if value is None:
        return None
    found: set[int] = set()
    for part in value.split(","):
        first, last = span(part)
        if not 1 <= first <= last:
            raise click.BadParameter(f"{value!r} is no list of layers; an example: 4,8,10-12")
        found |= set(range(first, last + 1))
    return sorted(found)


def span(text: str) -> tuple[int, int]:
    """First and last of "4" or "12-20"; (1, 0), which is empty, of anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", text)
    return (int(match[1]), int(match[2] or match[1])) if match else (1, 0)


def vocabulary_size(ctx: click.Context, param: click.Parameter, text: Any) -> int | None:
    """A number of tokens; 0 for "none", which draws no line."""
    if text is None or text == "none":
        return None if text is None else 0
    return int(click.IntRange(min=1).convert(text, param, ctx))


def draft_text(ctx: click.Context, param: click.Parameter, name: Any) -> str | Path | None:
    """The text of a file, which `draft_text_file` names later; the file, where it is of `index`; ""
    for "none"."""
    if name is None or name == "none":
        return None if name is None else ""
    ctx.meta[_DRAFT_TEXT_FILE] = name
    if Path(name).suffix == Path(DRAFT_TEXT_FILE).suffix:
        return Path(name)
    try:
        return read_text_file(Path(name))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def draft_text_file() -> str | None:
    """The file that --draft-text named, which no output is to replace."""
    return click.get_current_context().meta.get(_DRAFT_TEXT_FILE)


def device(_: click.Context, __: click.Parameter, name: str) -> str:
    """A callback that refuses the name of a device that is not here."""
    try:
        device_of(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return name


def stop_texts(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """A callback that refuses an empty text, with which every answer would end at once."""
    if "" in texts:
        raise click.BadParameter("an empty text stops nothing")
    return texts


def json_object(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    """A callback that reads names and values from JSON."""
    try:
        found = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"no JSON: {error}") from error
    if text is not None and not isinstance(found, dict):
        raise click.BadParameter(f'{text} has no names; an example: {{"enable_thinking": false}}')
    return found


SEED = click.IntRange(-(2**63), 2**64 - 1)  # what PyTorch takes


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """See `click.ParamType`."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number that can be used", param, ctx)
        return number


Command = Callable[..., Any]


def _stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj["debug"] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_note_debug,
    help="Show the traceback of a failure.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document."
)
common_options = _stack(
    json_option,
    click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the result as one JSON document to a file.",
    ),
    debug_option,
)
model_option = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help=f"A checkpoint folder, a GGUF file, a hub id, or one of: {', '.join(BUILTIN_MODELS)}.",
)
model_options = _stack(
    model_option,
    click.option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        help="Default: bfloat16 where that is fast (GPU, AVX-512, compiled kernels), else float32.",
    ),
    click.option(
        "--weights",
        type=click.Choice(list(WEIGHTS)),
        default="16bit",
        show_default=True,
        help="How weights are kept; int8 and int4 quantize them while they are loaded.",
    ),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        callback=device,
        help="cpu, cuda, cuda:1, ...",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads to use."),
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Run in kernels compiled for this CPU, once (the default where they are available), or"
        " through torch.compile on a GPU.",
    ),
)
mode_options = _stack(
    click.option(
        "--mode",
        type=click.Choice(["auto", *MODES]),
        default="auto",
        show_default=True,
        help="auto: drafts from n-grams, and by early exit where the checkpoint or --exit-layer says"
        " so, as far as they pay.",
    ),
    click.option(
        "--exit-layer",
        type=click.IntRange(min=1),
        metavar="E",
        help="How many layers have run when the model exits, 1 to all.",
    ),
    click.option(
        "--draft-tokens",
        type=click.IntRange(min=0),
        metavar="d",
        help="How many tokens are drafted in a round; with --adaptive at most.",
    ),
    click.option(
        "--draft-from",
        type=click.Choice(DRAFT_SOURCES),
        help="early-exit, n-gram: what followed the last tokens before, or both. Default: in auto what"
        " the checkpoint is good for, else early-exit.",
    ),
    click.option(
        "--adaptive/--no-adaptive",
        default=None,
        help="End a draft where another token is not worth its cost. Default: in auto.",
    ),
)
sampling_options = _stack(
    click.option(
        "--temperature",
        type=Number(min=0.0),
        default=0.0,
        show_default=True,
        help="0 is greedy.",
    ),
    click.option("--top-k", type=click.IntRange(min=1), help="Keep the k most likely tokens."),
    click.option(
        "--top-p",
        type=Number(min=0.0, min_open=True, max=1.0),
        help="Keep the most likely tokens up to this probability.",
    ),
    click.option(
        "--min-p",
        type=Number(min=0.0, max=1.0),
        help="Keep tokens of at least this share of the highest probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=Number(min=0.0, min_open=True),
        default=1.0,
        show_default=True,
    ),
)
decoding_options = _stack(
    mode_options,
    click.option(
        "--draft-vocabulary",
        callback=vocabulary_size,
        metavar="N|none",
        help="The early exit drafts only the first N tokens of the checkpoint's list (else of the"
        " vocabulary), and the prompt's; none: all. Default: in auto the whole list.",
    ),
    click.option(
        "--draft-text",
        callback=draft_text,
        metavar="FILE|none",
        help="A text that is like the answers, or what `layerskip index` made of one: searched for"
        " n-grams beside prompt and answer. Default: in auto the checkpoint's.",
    ),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N"
    ),
    sampling_options,
    click.option(
        "--seed",
        type=SEED,
        help="Makes sampling repeatable; each prompt draws apart.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        callback=stop_texts,
        help="End the answer here; may be repeated.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after an end token."),
)
view_options = _stack(
    click.option("--stats", is_flag=True, help="Print speed and acceptance to stderr."),
    click.option(
        "--show-draft",
        is_flag=True,
        help="Colour the answer by where each token came from (brackets where there is no colour).",
    ),
)
template_option = click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    callback=json_object,
    help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
)
answering_options = _stack(
    template_option, model_options, decoding_options, view_options, common_options
)


def load_model(flags: dict[str, Any]) -> LayerSkipModel:
    """The model that the flags of `model_options` describe, with a word on stderr while it loads."""
    machine.set_threads(flags["threads"])
    if not given(("device",)):
        machine.note_idle_gpu()
    is_here = Path(name := flags["model"]).exists()
    if name in BUILTIN_MODELS and is_here:
        log_stderr(f"{name} is taken from the folder of that name here")
    fetch_if_builtin(name)
    how = {field: flags[field] for field in ("dtype", "weights", "device", "compile")}
    with waiting(f"loading {name}", is_here or name in BUILTIN_MODELS), warnings_in_one_line():
        model = LayerSkipModel.from_pretrained(name, **how, announce=say)
    machine.note_weights(model.decoder)
    return model


@contextlib.contextmanager
def warnings_in_one_line(*, is_shown: bool = True) -> Iterator[None]:
    """Our own warnings without the place in the code that they come from, or none of them."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.startswith("layerskip."):
                if is_shown:
                    log_stderr(str(message))
            else:
                plain(escape_control_chars(str(message)), category, *place, **more)

        warnings.showwarning = show
        yield


def fetch(name: str) -> Path:
    """Pull a built-in model and say so on stderr."""
    with waiting(name):
        return pull(name, lambda line: say(f"{name}: {line}"))


def fetch_if_builtin(name: str) -> None:
    """Fetch the model first, where the name is a built-in one that is not in the cache yet."""
    if name in BUILTIN_MODELS and not is_pulled(name) and not Path(name).exists():
        fetch(name)


def say(what: str) -> None:
    """A line on stderr about something that takes long."""
    click.echo(f"{what} ...", err=True)


def given(names: Sequence[str]) -> list[str]:
    """Those of the flags that stand on the command line, as they are written there."""
    source = click.get_current_context().get_parameter_source
    on_it = [name for name in names if source(name) is click.core.ParameterSource.COMMANDLINE]
    return ["--" + name.replace("_", "-") for name in on_it]


def note_without_effect(names: Sequence[str], why: str) -> None:
    """A line on stderr for each of these flags that was given and changes nothing."""
    for flag in given(names):
        log_stderr(f"{flag} has no effect: {why}")


def note_idle_sampling(flags: dict[str, Any], *more: str) -> None:
    """A line on stderr for each flag of sampling, and of these, where nothing is drawn."""
    if not flags["temperature"]:
        names = ("top_k", "top_p", "min_p", *more)
        note_without_effect(names, "without --temperature the likeliest token is taken")


def note_cut(generation: Generation) -> None:
    """A line on stderr where an answer was cut at a length that nobody asked for."""
    if generation.finish_reason != "length" or given(("max_new_tokens",)):
        return
    n, asked = generation.new_tokens, click.get_current_context().params["max_new_tokens"]
    more = "--max-new-tokens allows more" if n == asked else "the context is full"
    click.echo(f"(cut after {n} tokens; {more})", err=True)


def decoding_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of `decoding_options` as arguments of `LayerSkipModel.answer`."""
    known = inspect.signature(LayerSkipModel.answer).parameters
    return {name: value for name, value in flags.items() if name in known}


def waiting(what: str, is_shown: bool = True) -> contextlib.AbstractContextManager[Any]:
    """A spinner on stderr, where that is a terminal and nothing else (the hub) has bars there."""
    if not (is_shown and sys.stderr.isatty()):  # rich also takes $FORCE_COLOR for a terminal
        return contextlib.nullcontext()
    return Console(stderr=True).status(escape(escape_control_chars(what)))
