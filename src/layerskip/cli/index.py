"""`layerskip index`: make the table of a long text that drafts are looked up in."""

from collections.abc import Iterator
from pathlib import Path

import click

from layerskip.cli.config_flags import common_options, fetch_if_builtin, model_option
from layerskip.cli.output import check_outputs, deliver, track
from layerskip.data.readers import Row, is_table, local_files, read_rows, read_text_file
from layerskip.decoding.draft_text import Datastore
from layerskip.model import open_files, resolve
from layerskip.model.checkpoint import DRAFT_TEXT_FILE
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.training.data import Encoding

_SUFFIX = Path(DRAFT_TEXT_FILE).suffix


@click.command("index")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="DATA",
    help="Text that is like the answers; several times, or a pattern such as 'src/**/*.py'. Of jsonl,"
    " json, csv, tsv and parquet a row is read as in `layerskip train`, of other files all of it.",
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
    model: str,
    data: tuple[str, ...],
    prompt: str,
    completion: str,
    completion_only: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Make a table of what comes next in a text, for drafts that cost no layer.

    PATH is the file that --draft-text takes, NAME.table, or a checkpoint's folder, whose table mode auto
    then uses. A million tokens become 4 to 23 MB, read when they are first used.

    \b
    Examples:
      layerskip index code.table --data 'src/**/*.py'
      layerskip generate --draft-text code.table --prompt "def fib(n):"
      layerskip index runs/mine --model runs/mine --data rows.jsonl
    """
    table = path / DRAFT_TEXT_FILE if path.is_dir() else path
    if table.suffix != _SUFFIX:
        raise click.UsageError(f"{path} has to be a folder, or a file whose name ends in {_SUFFIX}")
    check_outputs({"PATH": table, "--output": output})
    files = [file for source in data for file in _files(source)]
    fetch_if_builtin(model)
    opened = open_files(resolve(model))
    tokenizer, vocab_size = opened.tokenizer(), opened.architecture.vocab_size
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, which a text needs")
    encoding = Encoding(
        tokenizer=tokenizer, prompt=prompt, completion=completion, completion_only=completion_only
    )
    text: list[int] = []
    for file in track(files, "reading"):
        for where, row in _rows(file):
            text += [label for label in encoding(where, row)["labels"] if label != IGNORED_LABEL]
    found = Datastore.from_tokens(text)
    if not len(found):
        raise ValueError("nothing in this text ever came next: give more of it")
    found.save(table, vocab_size)
    if not as_json:
        click.echo(f"{table}: {len(text):,} tokens, {len(found):,} runs of tokens")
    result = {"path": str(table), "tokens": len(text), "runs": len(found)}
    deliver(result, as_json=as_json, output=output)


def _files(source: str) -> list[str]:
    found = local_files(source)
    if not found:
        raise ValueError(f"there is no file {source}")
    return found


def _rows(file: str) -> Iterator[Row]:
    """Rows of a table, or one row that is all of a text."""
    if is_table(file):
        yield from read_rows(file)
        return
    yield file, {Encoding.text_field: read_text_file(Path(file))}
