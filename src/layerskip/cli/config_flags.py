"""Command line flags from configuration dataclasses, and the options that all commands share.

Each field made by `layerskip.options.option` becomes a flag, with its help, default and bounds. A flag
that is not given is None (or an empty tuple) and leaves the field to the dataclass.
"""

import dataclasses
import json
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from layerskip.cli.output import log_stderr, log_work, waiting
from layerskip.decoding import DecodingConfig, Generation, LayerSkipModel
from layerskip.decoding.config import MAX_GRAMMAR
from layerskip.decoding.placement import DTYPES, device_of
from layerskip.model import Decoder, native
from layerskip.model.checkpoint import DRAFT_TEXT_FILE
from layerskip.model.hub import BUILTIN_MODELS, DEFAULT_MODEL, is_pulled, pull
from layerskip.model.kv_cache import KV_CACHES
from layerskip.model.quantize import WEIGHTS
from layerskip.options import Option, check_options, option, plain_type

_Config = TypeVar("_Config")
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_DATASTORE_FILE = "layerskip.datastore_file"  # key in click's `meta`
_LONGEST_TEXT = 1 << 24  # bytes of a text that is tokenized at every start
DRAFTING = ("draft_tokens", "draft_from", "adaptive", "draft_vocabulary", "datastore")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Options of loading a model.

    Raises:
        ValueError: a value is out of range, or the device is not available.
    """

    model: str = option(
        DEFAULT_MODEL,
        "Checkpoint folder, GGUF file, hub id (ORG/NAME, ORG/NAME:Q4_K_M), or one of:"
        f" {', '.join(BUILTIN_MODELS)}.",
        metavar="MODEL",
    )
    dtype: str | None = option(
        None,
        "Default: bfloat16 where that is fast (GPU, AVX-512, compiled kernels), else float32.",
        choices=tuple(DTYPES),
    )
    weights: str = option(
        "stored",
        "Weights in memory: as a quantized GGUF file stores them (other files: as 16bit), in --dtype"
        " (16bit), or quantized at load time (int8, int4).",
        choices=tuple(WEIGHTS),
    )
    kv_cache: str = option(
        "auto",
        "Precision of keys and values: that of --dtype (auto), or int8, which takes about half the"
        " memory of bfloat16.",
        choices=KV_CACHES,
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", metavar="DEVICE")
    threads: int | None = option(
        None, "Number of CPU threads.", at_least=1, at_most=1024, metavar="N"
    )
    compile: bool | None = option(
        None,
        "Use kernels compiled for this CPU (the default where they are available), or"
        " torch.compile on a GPU.",
    )
    adapter: str | None = option(
        None,
        "Exit adapter to draft with: file, folder or hub id, or none (default: the one beside the"
        " checkpoint or built in).",
        metavar="ADAPTER",
    )

    def __post_init__(self) -> None:
        check_options(self)
        device_of(self.device)


class _IntegerList(click.ParamType[Any]):
    """Integers with commas between them, and ranges: 4,8,12-20."""

    name = "integers"

    def __init__(self, description: Option) -> None:
        self._range = _integer_range(description)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return each integer once, in the order given."""
        if not isinstance(value, str):
            return tuple(value)
        numbers: list[int] = []
        for part in value.split(","):
            first, last = parse_range(part)
            if first > last:
                self.fail(f"{value!r} is not a list such as 4,8,10-12", param, ctx)
            numbers += range(first, last + 1)
        return tuple(dict.fromkeys(self._range.convert(n, param, ctx) for n in numbers))


class _NameList(click.ParamType[Any]):
    """Names with commas between them."""

    name = "names"

    def __init__(self, choices: Collection[str] | None) -> None:
        self._name = click.STRING if choices is None else click.Choice(list(choices))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return each name once, in the order given."""
        parts = value.split(",") if isinstance(value, str) else value
        names = (part.strip() for part in parts)
        return tuple(dict.fromkeys(self._name.convert(n, param, ctx) for n in names if n))


class _OrNone(click.ParamType[Any]):
    """An integer above 0, or the word none, which stands for 0."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer."""
        return 0 if value == "none" else int(click.IntRange(min=1).convert(value, param, ctx))


class _Datastore(click.ParamType[Any]):
    """A text file, a table made by `layerskip index`, or the word none, which stands for ""."""

    name = "file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | Path:
        """Return the text of a file, or the path of a table."""
        if value == "none" or isinstance(value, Path):
            return "" if value == "none" else value
        path = Path(value)
        if ctx is not None:
            ctx.meta[_DATASTORE_FILE] = value
        if path.suffix == Path(DRAFT_TEXT_FILE).suffix:
            return path
        try:
            with path.open("rb") as file:
                content = file.read(_LONGEST_TEXT + 1)
            if len(content) > _LONGEST_TEXT:
                self.fail(
                    f"{value} has more than {_LONGEST_TEXT >> 20} MiB: make a table of it with"
                    " layerskip index",
                    param,
                    ctx,
                )
            return content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{value} cannot be read: {error}", param, ctx)


class _SchemaFile(click.ParamType[Any]):
    """A file with a JSON schema."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return its text."""
        try:
            with Path(value).open(encoding="utf-8-sig") as file:
                text = file.read(MAX_GRAMMAR + 1)
            if len(text) > MAX_GRAMMAR:
                self.fail(f"{value} has more than {MAX_GRAMMAR} characters", param, ctx)
            return text
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{value} cannot be read: {error}", param, ctx)


# Fields of several types: (type of the flag, placeholder).
_SPECIAL = {
    "draft_vocabulary": (_OrNone(), "N|none"),
    "datastore": (_Datastore(), "FILE|none"),
    "prediction": (click.STRING, "FILE|-"),  # the command reads it
    "json_schema": (_SchemaFile(), "FILE"),
}


def _integer_range(description: Option) -> click.ParamType[Any]:
    low, high = description.at_least, description.at_most
    if low is None is high or (high is not None and high >= 2**63):  # the config checks it
        return click.INT
    return click.IntRange(
        None if low is None else int(low), None if high is None else int(high), clamp=False
    )


def _number_range(description: Option) -> click.ParamType[Any]:
    low = description.at_least if description.above is None else description.above
    if low is None is description.at_most:
        return click.FLOAT
    return click.FloatRange(low, description.at_most, min_open=description.above is not None)


def _flag(name: str, kind: Any, description: Option, default: Any) -> _Decorator:
    """Return the click option of a field."""
    flags = description.flags or ("--" + name.replace("_", "-"),)
    attributes: dict[str, Any] = {"default": None, "help": _help(description, default)}
    metavar = description.metavar
    choices = description.choices
    if typing.get_origin(kind) is typing.Literal:
        kind, choices = str, typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        attributes["type"], metavar = _SPECIAL[name]
    elif kind is bool:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:])
    elif typing.get_origin(kind) is tuple:
        if int in typing.get_args(kind):
            attributes["type"], metavar = _IntegerList(description), metavar or "N,..."
        elif choices is not None or "," in (metavar or ""):
            attributes["type"], metavar = _NameList(choices), metavar or "NAME,..."
        else:
            attributes |= {"multiple": True, "default": ()}
    elif choices is not None:
        attributes["type"], metavar = click.Choice(list(choices)), None
    elif kind is int:
        attributes["type"], metavar = _integer_range(description), metavar or "N"
    elif kind is float:
        attributes["type"], metavar = _number_range(description), metavar or "X"
    elif kind is Path:
        attributes["type"] = click.Path(path_type=Path)
    if metavar is not None:
        attributes["metavar"] = metavar
    return click.option(*flags, name, **attributes)


def _help(description: Option, default: Any) -> str:
    """Return the help text, with the default where that is one value."""
    text = description.help
    if isinstance(default, tuple) and default:
        default = ",".join(map(str, default))
    is_value = isinstance(default, str | int | float) and not isinstance(default, bool)
    if not is_value or default == "" or "default" in text.lower():
        return text
    default_text = f"{default:g}" if isinstance(default, float) else default
    return f"{text}  [default: {default_text}]"


def config_fields(config: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Any, Option]]:
    """Return name -> (field, type, description) of all options of a configuration class.

    The fields of a nested dataclass follow its own.
    """
    hints = typing.get_type_hints(config)
    result: dict[str, tuple[dataclasses.Field[Any], Any, Option]] = {}
    nested: dict[str, tuple[dataclasses.Field[Any], Any, Option]] = {}
    for field in dataclasses.fields(config):
        kind = plain_type(hints[field.name])
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            nested |= config_fields(kind)
        elif "option" in field.metadata:
            result[field.name] = field, kind, field.metadata["option"]
        elif "help" in field.metadata:
            description = Option(help=field.metadata["help"], flags=field.metadata["flags"])
            result[field.name] = field, kind, description
    return result | {name: value for name, value in nested.items() if name not in result}


def config_options(
    config: type[Any],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    **defaults: Any,
) -> _Decorator:
    """Return a decorator that adds a flag for every option of a configuration class.

    Args:
        config: the class.
        only: names of the options that the command has; None = all.
        without: names of options that it has not.
        defaults: of this command, where they are not those of the class (see `config_from_flags`).
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, (field, kind, description) in reversed(config_fields(config).items()):
            is_selected = (only is None or name in only) and name not in without
            if is_selected and description.on_command_line:
                default = defaults.get(name, field.default)
                command = _flag(name, kind, description, default)(command)
        return command

    return decorate


def given_flags(config: type[Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's flags that are options of a class and have been given."""
    names = config_fields(config)
    return {
        name: value for name, value in flags.items() if name in names and value not in (None, ())
    }


def config_from_flags(config: type[_Config], flags: Mapping[str, Any], **defaults: Any) -> _Config:
    """Return an instance of a configuration class, in which flags that were given replace defaults.

    Args:
        config: the class.
        flags: of the command; those of other classes are left out.
        defaults: of this command.

    Raises:
        click.UsageError: a value is out of range, or values contradict each other.
    """
    try:
        return config(**{**defaults, **given_flags(config, flags)})
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def parse_range(text: str) -> tuple[int, int]:
    """Return first and last of "4" or "12-20"; (1, 0), which is empty, of anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", text)
    return (int(match[1]), int(match[2] or match[1])) if match else (1, 0)


def exit_layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """Read exit layers such as 4,8,12-20 (a click callback); ascending, each once."""
    if value is None:
        return None
    layers: set[int] = set()
    for part in value.split(","):
        first, last = parse_range(part)
        if not 1 <= first <= last:
            raise click.BadParameter(f"{value!r} is not a list of layers such as 4,8,10-12")
        layers |= set(range(first, last + 1))
    return sorted(layers)


def json_object(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """Read names and values from JSON (a click callback)."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.BadParameter(f"this is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise click.BadParameter(
            f'{text[:100]} is not an object such as {{"enable_thinking": false}}'
        )
    return value


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj["debug"] = True


def stack(*options: _Decorator) -> _Decorator:
    """Return one decorator for several, in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(options):
            command = one(command)
        return command

    return decorate


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
common_options = stack(
    json_option,
    click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write the result as one JSON document to a file.",
    ),
    debug_option,
)
model_option = config_options(ModelConfig, only=("model",))
model_options = config_options(ModelConfig)
# Options of decoding that `layerskip generate` alone has.
GENERATE_ONLY = ("prediction", "json_schema", "regex")
answer_options = stack(
    click.option(
        "--chat-template-kwargs",
        metavar="JSON",
        callback=json_object,
        help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
    ),
    model_options,
    config_options(DecodingConfig, without=GENERATE_ONLY),
    click.option("--stats", is_flag=True, help="Print speed and acceptance to stderr."),
    click.option(
        "--show-draft",
        is_flag=True,
        help="Mark drafted tokens by colour (by brackets where there is no colour).",
    ),
    common_options,
)


def datastore_file() -> str | None:
    """Return the file that --datastore names, which no output may replace."""
    return click.get_current_context().meta.get(_DATASTORE_FILE)


def load_model(config: ModelConfig) -> LayerSkipModel:
    """Load a model, with a spinner and notes on stderr."""
    set_threads(config.threads)
    if not given(("device",)):
        note_idle_gpu()
    name = config.model
    is_here = Path(name).exists()
    if name in BUILTIN_MODELS and is_here:
        log_stderr(f"{name} is taken from the folder of that name here")
    fetch_if_builtin(name)
    with waiting(f"loading {name}", is_here or name in BUILTIN_MODELS):  # the hub has its own bars
        model = LayerSkipModel.from_pretrained(
            name,
            dtype=config.dtype,
            weights=config.weights,
            kv_cache=config.kv_cache,
            device=config.device,
            compile=config.compile,
            adapter=config.adapter,
            announce=log_work,
        )
    note_weights(model.decoder)
    return model


def set_threads(threads: int | None = None) -> None:
    """Set PyTorch's number of threads; None: no more than a container's share of the CPUs.

    PyTorch counts all CPUs. With more threads than its share a container is stopped for the rest of
    each period, and all threads wait for those that are.
    """
    threads = native.num_threads_to_use() if threads is None else threads
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def note_idle_gpu() -> None:
    """Note that a GPU is available, for commands that were not told which device to use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old
        is_available = torch.cuda.is_available()
    if is_available:
        log_stderr("a GPU is here: --device cuda uses it")


def note_weights(decoder: Decoder) -> None:
    """Note where quantized weights save neither memory nor time."""
    on_gpu, in_bfloat16 = decoder.device.type == "cuda", decoder.dtype == torch.bfloat16
    if on_gpu and in_bfloat16 and decoder.weights == "int8":
        log_stderr(
            "in bfloat16 on a GPU --weights int8 takes more memory than 16bit; int4 takes less"
        )
    if decoder.weights != "16bit" and decoder.kernels == "pytorch" and not (on_gpu or in_bfloat16):
        log_stderr(f"without the compiled kernels --weights {decoder.weights} is slower than 16bit")


def fetch(name: str) -> Path:
    """Fetch a built-in model, with notes on stderr."""
    with waiting(name):
        return pull(name, lambda line: log_work(f"{name}: {line}"))


def fetch_if_builtin(name: str) -> None:
    """Fetch a built-in model that is not in the cache yet."""
    if name in BUILTIN_MODELS and not is_pulled(name) and not Path(name).exists():
        fetch(name)


def given(names: Sequence[str]) -> list[str]:
    """Return those of some parameters that are on the command line, as flags."""
    source = click.get_current_context().get_parameter_source
    on_it = [name for name in names if source(name) is click.core.ParameterSource.COMMANDLINE]
    return ["--" + name.replace("_", "-") for name in on_it]


def note_without_effect(names: Sequence[str], why: str) -> None:
    """Note each of some flags that was given and changes nothing."""
    for flag in given(names):
        log_stderr(f"{flag} has no effect: {why}")


def note_idle_sampling(temperature: float, *more: str) -> None:
    """Note flags of sampling, and some more, that have no effect in greedy decoding."""
    if not temperature:
        names = ("top_k", "top_p", "min_p", *more)
        note_without_effect(names, "without --temperature decoding is greedy")


def note_length(generation: Generation, config: DecodingConfig) -> None:
    """Note an answer that was cut at a length that was not asked for."""
    if generation.finish_reason != "length" or given(("max_new_tokens",)):
        return
    n = generation.new_tokens
    is_limit = n == config.max_new_tokens
    more = "--max-new-tokens allows more" if is_limit else "the context is full"
    click.echo(f"(cut after {n} tokens; {more})", err=True)
