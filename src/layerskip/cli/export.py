"""`layerskip export`: a checkpoint for other programs."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import click

from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    fetch_if_builtin,
    model_option,
    set_threads,
)
from layerskip.cli.output import Report, bars, check_outputs, deliver, escape_control_chars
from layerskip.export import (
    GGUF_WEIGHTS,
    HF_WEIGHTS,
    Calibration,
    ExportError,
    ExportReport,
    Source,
    calibrate,
    check_new_folder,
    check_room,
    least_bytes,
    open_source,
    to_gguf,
    to_hf,
)

_FORMATS = ("hf", "hf-draft", "gguf")
_INT4 = "int4"


@click.command("export")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@model_option
@click.option("--to", "to_format", type=click.Choice(_FORMATS), required=True, help="Format.")
@click.option(
    "--weights",
    type=click.Choice([*GGUF_WEIGHTS, _INT4]),
    help=f"Precision of the matrices; hf: {', '.join(HF_WEIGHTS)}, and int4 with --calibrate. Default:"
    " that of the source (in hf, quantized ones are dequantized to float32).",
)
@click.option(
    "--calibrate",
    "calibration",
    metavar="FILE",
    help="Text file (or wikitext2) of 2,500 tokens or more, of which 80,000 are used: GPTQ rounds the"
    " layers to 4 bits on it, with --to hf --weights int4, or --to gguf --weights q4_0 or q4_1.",
)
@click.option(
    "--embedding",
    type=click.Choice([*GGUF_WEIGHTS]),
    help="Precision of embedding and head in a GGUF file. Default: q8_0 with 4-bit weights, else that"
    " of the matrices. --calibrate rounds them too if they are q4_0 or q4_1.",
)
@click.option(
    "--exit-layer",
    type=click.IntRange(min=1),
    metavar="E",
    help="Export the first E layers, final norm and head: a draft model. Default of hf-draft: the"
    " exit layer that the checkpoint names.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint or file.")
@common_options
def command(
    path: Path,
    model: str | None,
    to_format: str,
    weights: str | None,
    calibration: str | None,
    embedding: str | None,
    exit_layer: int | None,
    overwrite: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Write a checkpoint that other programs load: the whole model, or its first layers as a draft.

    PATH is the folder (hf, hf-draft) or the .gguf file to make.

    \b
    Examples:
      layerskip export --model smollm2-135m --to hf smollm2
      layerskip export --model my-checkpoint --to hf-draft --exit-layer 8 my-draft
      layerskip export --model my-checkpoint --to gguf --weights q8_0 my-model.gguf
      layerskip export --model my-checkpoint --to gguf --exit-layer 8 my-draft.gguf
      layerskip export --model my-checkpoint --to hf --weights int4 --calibrate text.txt my-int4
      layerskip export --model my-checkpoint --to gguf --weights q4_0 --calibrate text.txt my.gguf
    """
    name = config_from_flags(ModelConfig, {"model": model}).model
    check_outputs({"--output": output}, beside=(name, calibration))
    if output is not None and output.resolve() == path.resolve():
        raise click.UsageError(f"PATH and --output are both {path}: name another file")
    _check_usage(path, to_format, weights, calibration, exit_layer)
    if to_format != "gguf" and embedding is not None:
        raise click.UsageError("--embedding goes with --to gguf")
    fetch_if_builtin(name)
    set_threads()
    source = open_source(name, exit_layer)
    if to_format == "hf-draft" and exit_layer is None:
        chosen = source.files.settings.exit_layer
        if chosen is None:
            raise click.UsageError("this checkpoint names no exit layer; give --exit-layer")
        source = open_source(name, chosen)
    if calibration is not None:  # which rounds for minutes before it writes
        if to_format == "hf":
            check_new_folder(path, overwrite=overwrite)
            check_room(path, least_bytes(source))
        elif path.exists() and not overwrite:
            raise ExportError(f"{path} exists; choose another name or say --overwrite")
    write: Callable[..., ExportReport]
    if to_format == "gguf":
        write = functools.partial(to_gguf, weights=weights, embedding=embedding)
    else:
        write = functools.partial(to_hf, weights=None if weights == _INT4 else weights)
    with bars() as report:
        if calibration is not None:
            kinds = weights or "", embedding or "q8_0"
            calibrated = _calibrated(source, calibration, kinds, report)
            write = functools.partial(write, calibrated=calibrated)
        writing = functools.partial(report, f"writing {path}")
        written = write(source, path, overwrite=overwrite, progress=writing)
    result = dataclasses.asdict(written) | {"path": str(path), "source": name}
    deliver(result, as_json=as_json, output=output)
    if not as_json:
        _show(written)


def _check_usage(
    path: Path,
    to_format: str,
    weights: str | None,
    calibration: str | None,
    exit_layer: int | None,
) -> None:
    """Refuse flags that do not go together."""
    if to_format == "hf" and exit_layer is not None:
        raise click.UsageError(
            "--to hf is the whole model; --exit-layer goes with hf-draft or gguf"
        )
    if weights == _INT4 and to_format != "hf":
        raise click.UsageError("--weights int4 goes with --to hf; of gguf there is q4_1")
    if weights == _INT4 and calibration is None:
        raise click.UsageError("--weights int4 and --calibrate go together")
    rounded = ("q4_0", "q4_1") if to_format == "gguf" else (_INT4,)
    if calibration is not None and weights not in rounded:
        raise click.UsageError(f"--calibrate and --weights {' or '.join(rounded)} go together")
    if calibration is not None and exit_layer is not None:
        raise click.UsageError("--calibrate rounds the whole model; leave --exit-layer out")
    if to_format != "gguf" and weights not in (None, _INT4, *HF_WEIGHTS):
        raise click.UsageError(f"--weights of {to_format} is one of: {', '.join(HF_WEIGHTS)}")
    if to_format == "gguf" and path.suffix != ".gguf":
        raise click.UsageError(f"PATH {path} has to end in .gguf")


def _calibrated(source: Source, text: str, kinds: tuple[str, str], report: Report) -> Calibration:
    """Read the text and round the layers, and perhaps embedding and head, by it."""
    from layerskip.data.readers import read_text

    tokenizer = source.files.tokenizer()
    if tokenizer is None:
        raise ValueError("calibration on a text needs a tokenizer, and this checkpoint has none")
    tokens = tokenizer.encode(read_text(text), add_special_tokens=False, verbose=False)
    kind, embedding = kinds
    return calibrate(
        source,
        tokens,
        functools.partial(report, "rounding layers"),
        kind=GGUF_WEIGHTS.get(kind, GGUF_WEIGHTS["q4_1"]),
        embedding=GGUF_WEIGHTS[embedding],
    )


def _show(written: ExportReport) -> None:
    w = written
    kinds = ", ".join(
        f"{count} {kind}" for kind, count in sorted(w.stored_as.items(), key=lambda item: -item[1])
    )
    carried = f"; {w.carried_over} as the source has them" if w.carried_over else ""
    size = f"{w.layers} layers, {w.bytes / 1e6:.1f} MB, {w.tensors} tensors ({kinds}{carried})"
    click.echo(f"{escape_control_chars(str(w.path))}: {size}")
    if w.nll_change is not None:
        loaded = "with --weights int4" if w.format == "hf" else "rounded to 4 bits"
        click.echo(
            f"{loaded}: {w.nll_change:+.1%} negative log-likelihood on held-out parts of the text,"
            " against 16 bits"
        )
