"""`layerskip export`: a checkpoint for other programs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from layerskip.cli.options import check_output, debug_option, deliver, fetch, result_options
from layerskip.export import GGUF_WEIGHTS, HF_WEIGHTS, Written, open_source, to_gguf, to_hf
from layerskip.model.source import BUILTIN_MODELS, DEFAULT_MODEL, is_pulled

_FORMATS = ("hf", "hf-draft", "gguf")


@click.command("export")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help=f"A checkpoint folder, a GGUF file, a hub id, or one of: {', '.join(BUILTIN_MODELS)}.",
)
@click.option("--to", "to_format", type=click.Choice(_FORMATS), required=True)
@click.option(
    "--weights",
    type=click.Choice(list(GGUF_WEIGHTS)),
    help=f"How matrices are stored; of hf: {', '.join(HF_WEIGHTS)}. Default: as the source has them"
    " (in hf, quantized ones as the float32 numbers that they stand for).",
)
@click.option(
    "--exit-layer",
    type=click.IntRange(min=1),
    metavar="E",
    help="Export the first E layers, final norm and head: a draft model. Default of hf-draft: the"
    " exit layer that the checkpoint names.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint or file that is there.")
@result_options
@debug_option
def command(
    path: Path,
    model: str,
    to_format: str,
    weights: str | None,
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
    """
    check_output(output)
    if to_format == "hf" and exit_layer is not None:
        raise click.UsageError(
            "--to hf is the whole model; --exit-layer goes with hf-draft or gguf"
        )
    if to_format != "gguf" and weights is not None and weights not in HF_WEIGHTS:
        raise click.UsageError(f"--weights of {to_format} is one of: {', '.join(HF_WEIGHTS)}")
    if to_format == "gguf" and path.suffix != ".gguf":
        raise click.UsageError(f"PATH {path} has to end in .gguf")
    if model in BUILTIN_MODELS and not is_pulled(model) and not Path(model).exists():
        fetch(model)
    source = open_source(model, exit_layer)
    if to_format == "hf-draft" and exit_layer is None:
        chosen = source.files.settings.exit_layer
        if chosen is None:
            raise click.UsageError("this checkpoint names no exit layer; give --exit-layer")
        source = open_source(model, chosen)
    write: Callable[..., Written] = to_gguf if to_format == "gguf" else to_hf
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"writing {path}")
        written = write(
            source,
            path,
            weights=weights,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    result = dataclasses.asdict(written) | {"path": str(path), "source": model}
    deliver(result, as_json=as_json, output=output)
    if not as_json:
        _show(written)


def _show(written: Written) -> None:
    w = written
    kinds = ", ".join(
        f"{count} {kind}" for kind, count in sorted(w.stored_as.items(), key=lambda item: -item[1])
    )
    carried = f"; {w.carried_over} as the source has them" if w.carried_over else ""
    click.echo(
        f"{w.path}: {w.layers} layers, {w.bytes / 1e6:.1f} MB, {w.tensors} tensors ({kinds}{carried})"
    )
