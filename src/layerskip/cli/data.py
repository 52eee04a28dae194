"""Prompts from the command line, a file or standard input; and `layerskip index`."""

import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    fetch_if_builtin,
    model_option,
)
from layerskip.cli.output import check_outputs, deliver, escape_control_chars, track
from layerskip.data import readers
from layerskip.data.readers import Row, is_table, local_files, read_rows, read_text_file
from layerskip.decoding.config import MAX_PREDICTION
from layerskip.decoding.datastore import Datastore
from layerskip.fileio import check_within
from layerskip.model import open_files, resolve
from layerskip.model.checkpoint import DRAFT_TEXT_FILE
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.training.data import Encoding

_TABLE_SUFFIX = Path(DRAFT_TEXT_FILE).suffix


def read_prompts(prompt: str | None, file: Path | None, flag: str, *, chat: bool) -> list[Any]:
    """Return the prompts of a command, each a text, a list of token ids or a conversation.

    Args:
        prompt: of --prompt. Without it and without a file, standard input is one prompt, less a byte
            order mark and one line break at its end.
        file: compressed (.gz, .xz) or not; .jsonl with a field "prompt" or "messages" in each line (an
            answer at the end of a conversation is left out), else one prompt a line.
        flag: that names such a file.
        chat: make a conversation of each text.

    Raises:
        click.UsageError: there is no prompt, and standard input is a terminal.
        ValueError: the file or standard input cannot be read, a line is no prompt, or there is none.
    """
    if file is not None:
        check_finite_file(file)
        prompts = readers.read_prompts(file)
    elif prompt is not None:
        prompts = [prompt]
    elif sys.stdin.isatty():
        raise click.UsageError(f"give a prompt with --prompt or {flag}, or on standard input")
    else:
        prompts = [_standard_input()]
    if not chat:
        return prompts
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def read_prediction(source: str | None, *, stdin_is_taken: bool) -> str | None:
    """Return the text of --prediction: of a file, or of standard input ("-").

    Raises:
        click.UsageError: standard input is the prompt, or a terminal.
        ValueError: the text cannot be read.
    """
    if source is None:
        return None
    if source == "-":
        if stdin_is_taken or sys.stdin.isatty():
            raise click.UsageError(
                "--prediction - reads standard input, which"
                f" {'is the prompt' if stdin_is_taken else 'is a terminal'}; give a file"
            )
        return _standard_input(MAX_PREDICTION + 1)
    check_finite_file(source)
    return read_text_file(Path(source))


def check_finite_file(path: str | Path) -> None:
    """Refuse devices such as /dev/zero, which have no end; a terminal and pipes are fine."""
    path = Path(path)
    if path.exists() and stat.S_ISCHR(path.stat().st_mode) and path.resolve() != _terminal():
        raise ValueError(f"{path} is a device, not a file")


def _terminal() -> Path | None:
    return Path("/dev/stdin").resolve() if sys.stdin.isatty() else None


def _standard_input(max_chars: int = -1) -> str:
    try:
        return sys.stdin.read(max_chars).removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is no text in {error.encoding} ({error.reason})"
        ) from error


@click.command("index")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="DATA",
    help="Text that resembles the answers; repeatable, or a pattern such as 'src/**/*.py'. Rows of"
    " jsonl, json, csv, tsv and parquet are read as in `layerskip train`, other files whole.",
)
@click.option("--prompt", default=Encoding.prompt, show_default=True, help="As in `train`.")
@click.option("--completion", default=Encoding.completion, show_default=True, help="As in `train`.")
@click.option(
    "--completion-only/--no-completion-only",
    default=True,
    show_default=True,
    help="Leave prompts out.",
)
@common_options
def command(
    path: Path,
    model: str | None,
    data: tuple[str, ...],
    prompt: str,
    completion: str,
    completion_only: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Build an n-gram datastore: a table of the most frequent continuations in a text.

    PATH is a file NAME.table, for --datastore, or a checkpoint's folder, whose table mode auto then
    uses. A million tokens become 4 to 23 MB, which are read on first use.

    \b
    Examples:
      layerskip index code.table --data 'src/**/*.py'
      layerskip generate --datastore code.table --prompt "def fib(n):"
      layerskip index runs/mine --model runs/mine --data rows.jsonl
    """
    name = config_from_flags(ModelConfig, {"model": model}).model
    table = path / DRAFT_TEXT_FILE if path.is_dir() else path
    if table.suffix != _TABLE_SUFFIX:
        raise click.UsageError(
            f"{path} has to be a folder, or a file whose name ends in {_TABLE_SUFFIX}"
        )
    check_outputs({"PATH": table, "--output": output})
    check_within(table)
    files = [file for source in data for file in _files(source)]
    fetch_if_builtin(name)
    opened = open_files(resolve(name))
    tokenizer, vocab_size = opened.tokenizer(), opened.architecture.vocab_size
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which a text needs")
    encoding = Encoding(
        tokenizer=tokenizer, prompt=prompt, completion=completion, completion_only=completion_only
    )
    text: list[int] = []
    for file in track(files, "reading"):
        for where, row in _rows(file):
            text += [label for label in encoding(where, row)["labels"] if label != IGNORED_LABEL]
    datastore = Datastore.from_tokens(text)
    if not len(datastore):
        raise ValueError("this text is too short for n-grams: give more of it")
    datastore.save(table, vocab_size)
    if not as_json:
        click.echo(
            f"{escape_control_chars(str(table))}: {len(text):,} tokens, {len(datastore):,} n-grams"
        )
    result = {"path": str(table), "tokens": len(text), "runs": len(datastore)}
    deliver(result, as_json=as_json, output=output)


def _files(source: str) -> list[str]:
    files = local_files(source)
    if not files:
        raise ValueError(f"there is no file {source}")
    for file in files:
        check_finite_file(file)
    return files


def _rows(file: str) -> Iterator[Row]:
    """Yield the rows of a table, or one row with all of a text."""
    if is_table(file):
        yield from read_rows(file)
        return
    yield file, {Encoding.text_field: read_text_file(Path(file))}
