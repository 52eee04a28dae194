"""Prompts to tune on where the user names none: short and of many kinds, in the project's own words."""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from layerskip.decoding.prompt import CONVERSATION, Prompt, is_message

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields
_LONGEST_FIELD = 2**31 - 1  # characters of a field in a table
_ROWS_AT_ONCE = 1000
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
COMPRESSED = tuple(_OPENERS)
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


def read_rows(
    source: str, split: str = "train", config: str | None = None, text_field: str = "text"
) -> Iterator[Row]:
    """The rows of local files or a hub data set, each with where it stands ('train.tsv:17').

    The source is looked up at once, rows are read as they are asked for.

    Args:
        source: a file, compressed (.gz, .xz) or not, a pattern of several (`data/*_train.tsv.xz`,
            taken in alphabetical order), or a hub id. `$NAME` is replaced from the environment.
        split: of a hub data set.
        config: the part of a hub data set that has several.
        text_field: name of the field that a document of a .txt file is given.

    Raises:
        ValueError: for a file of unknown kind, a data set that is not found, or a bad row, which
            is named by its line.
    """
    found = local_files(source)
    source = _expanded(source)
    if found:
        return _one_after_another([_file_rows(Path(f), text_field) for f in found])
    if Path(source).suffix in (*_SUFFIXES, *COMPRESSED):
        raise ValueError(f"the data file {source} does not exist")
    return _hub_rows(source, split, config)


def _one_after_another(parts: Sequence[Iterator[Row]]) -> Iterator[Row]:
    for part in parts:
        yield from part


def is_table(file: str) -> bool:
    """Whether each row of such a file is one of its own, and not all of it a text."""
    suffix = _uncompressed(Path(file)).suffix
    return suffix in _SUFFIXES and suffix != ".txt"


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _file_rows(path: Path, text_field: str) -> Iterator[Row]:
    plain = _uncompressed(path)
    if plain.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is of no known kind; known are {', '.join(_SUFFIXES)}")
    return _parquet(path) if plain.suffix == ".parquet" else _text_rows(path, plain, text_field)


def _text_rows(path: Path, plain: Path, text_field: str) -> Iterator[Row]:
    readers: dict[str, Callable[[TextIO, str], Iterator[Row]]] = {
        ".jsonl": json_lines,
        ".json": _json,
        ".csv": _table,
        ".tsv": _table,
        ".txt": functools.partial(_paragraphs, field=text_field),
    }
    # Tables and JSON keep line breaks inside of fields as they are; of running text all are alike.
    with open_text(path, newline=None if plain.suffix == ".txt" else "") as file:
        yield from readers[plain.suffix](file, plain.name)


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow, parquet = _package("pyarrow"), _package("pyarrow.parquet")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            batches = parquet.ParquetFile(file).iter_batches(_ROWS_AT_ONCE)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{path.name}:{i}", _given(row)) for i, row in enumerate(rows, 1))
    except (*_DAMAGE, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as parquet: {reason}") from error


def _given(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without fields that are None, and parts of fields: a table has each of them in all rows."""

    def parts(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: parts(part) for name, part in value.items() if part is not None}
        return [parts(part) for part in value] if isinstance(value, list) else value

    given: Mapping[str, Any] = parts(row)
    return given


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file to read, compressed (.gz, .xz) or not, with a byte order mark or without.

    Raises:
        ValueError: it cannot be read, or, while it is read, is cut off, damaged, or no text in UTF-8.
    """
    try:
        with _OPENERS.get(path.suffix, open)(
            path, "rt", encoding="utf-8-sig", newline=newline
        ) as file:
            yield file
    except UnicodeDecodeError as error:  # its position is one in a part of the file
        line = _first_line_that_is_no_text(path)
        raise ValueError(f"{path.name}:{line} is no text in UTF-8: {error.reason}") from error
    except (*_DAMAGE, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error


def _first_line_that_is_no_text(path: Path) -> int:
    """Number of the line that stopped the reading of a file."""

    def is_text(line: bytes) -> bool:
        with contextlib.suppress(UnicodeDecodeError):
            line.decode()
            return True
        return False

    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        return 1 + sum(1 for _ in itertools.takewhile(is_text, file))


def local_files(source: str) -> list[str]:
    """The files that a source names; none for a data set of the hub.

    Raises:
        ValueError: an environment variable in its name is not set.
    """
    source = _expanded(source)
    if source.startswith("$"):
        raise ValueError(f"{source}: set this environment variable to the folder of the data")
    return [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))


def _expanded(source: str) -> str:
    return os.path.expanduser(os.path.expandvars(source))


def _hub_rows(source: str, split: str, config: str | None) -> Iterator[Row]:

    try:
        datasets = _package("datasets")
        with hidden_bars():
            rows = datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a data set that needs a script
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Config name is missing" in reason:
            reason += " (with data_config)"
        raise ValueError(
            f"{source} is no file, and as a data set of the hub it cannot be read: {reason}"
        ) from error
    return ((f"{source}:{i}", _given(row)) for i, row in enumerate(rows, 1))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError("this needs `datasets`: pip install 'layerskip[train]'") from None


def json_lines(file: TextIO, name: str) -> Iterator[Row]:
    """The objects of a file with one in each line; raises ValueError for others, named by their line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # a number of too many digits is one of no class of its own
            reason = getattr(error, "msg", error)
            raise ValueError(f"{name}:{number} is not JSON: {reason}") from None
        except RecursionError:
            raise ValueError(f"{name}:{number} is nested too deeply") from None
        yield f"{name}:{number}", _fields_of(row, f"{name}:{number}")


def _json(file: TextIO, name: str) -> Iterator[Row]:
    text = file.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines of JSON, under the other name that they have
            yield from json_lines(io.StringIO(text), name)
            return
        raise ValueError(f"{name}:{error.lineno} is not JSON: {error.msg}") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if isinstance(rows, dict) and "\n" not in text.strip():  # one line of JSON is lines too
        yield from json_lines(io.StringIO(text), name)
        return
    if not isinstance(rows, list):
        raise ValueError(f"{name} must hold a list of rows")
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", _fields_of(row, f"{name}, row {number}")


def _fields_of(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with fields")
    return row


def _table(file: TextIO, name: str) -> Iterator[Row]:
    # Tab-separated files quote nothing: a quotation mark in them is text.
    is_tabs = name.endswith(".tsv")
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader(
        file,
        delimiter="\t" if is_tabs else ",",
        quoting=csv.QUOTE_NONE if is_tabs else csv.QUOTE_MINIMAL,
        strict=True,  # or a quotation mark that is never closed swallows the rows behind it
    )
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line = reader.line_num
            raise ValueError(f"{name} cannot be read after line {line}: {error}") from None
        breaks = sum(text.count("\n") for text in row.values() if isinstance(text, str))
        where = f"{name}:{reader.line_num - breaks}"  # the line that the row begins in
        if None in row or None in row.values():
            columns = len(reader.fieldnames or ())
            raise ValueError(f"{where} does not have the {columns} columns of the first line")
        yield where, row


def _paragraphs(file: TextIO, name: str, field: str) -> Iterator[Row]:
    """Documents of a text file are separated by empty lines."""
    start, lines = 1, list[str]()
    for number, line in enumerate(file, 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield f"{name}:{start}", {field: "".join(lines)}
            lines = []
    if lines:
        yield f"{name}:{start}", {field: "".join(lines)}


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """For a while transformers and datasets show no progress bars of their own."""
    import datasets
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before[0]:
            logging.enable_progress_bar()
        if not before[1]:
            datasets.enable_progress_bars()


DataSetRow = Mapping[str, Any]
DATA_VARIABLE = "LAYERSKIP_DATA"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where the rows of a data set lie.

    Attributes:
        folder: its folder's name.
        files: split -> pattern of its files there, each compressed (.gz, .xz) or not.
        hub: id at the hub, None where it is not there.
        config: part of it at the hub.
        hub_splits: split -> its name at the hub, where that is another one.
        origin: where its makers publish it.
        ids: split -> ids of its rows, where one file holds all splits.
    """

    folder: str
    files: Mapping[str, str]
    hub: str | None = None
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    origin: str
    ids: Mapping[str, range] = field(default_factory=dict)

    def rows(self, split: str, data: str | None = None) -> list[DataSetRow]:
        """All rows of a split.

        Args:
            split: "test", "train", "validation" or "prompt".
            data: the folder of data sets; None takes that of $LAYERSKIP_DATA.

        Raises:
            ValueError: it is not to be had; the message says how to get it.
        """

        root = os.path.expanduser(data or os.environ.get(DATA_VARIABLE, "")) or None
        if split not in self.files:
            raise ValueError(f"{self.folder} has no {split} split")
        files = self._files(Path(root, self.folder), split) if root else []
        if files:
            rows = [row for file in files for _, row in read_rows(str(file))]
            return [row for row in rows if split not in self.ids or _id(row) in self.ids[split]]
        name = self.hub_splits.get(split, split)
        try:
            if self.hub is None:
                raise ValueError("it is not on the hub")
            return [row for _, row in read_rows(self.hub, name, config=self.config)]
        except ValueError as error:
            raise ValueError(self._advice(split, root, str(error))) from None

    def _files(self, folder: Path, split: str) -> list[Path]:
        """A split's files, each in one form alone: `gunzip -k` leaves both."""

        pattern = self.files[split].removesuffix("*")
        found: dict[str, Path] = {}
        for suffix in (*COMPRESSED, ""):
            for path in folder.glob(pattern + suffix):
                found[path.name.removesuffix(suffix)] = path
        return [found[name] for name in sorted(found)]

    def _advice(self, split: str, root: str | None, reason: str) -> str:
        place = Path(root or f"${DATA_VARIABLE}", self.folder, self.files[split])
        ways = [f"get it from {self.origin} and put it at {place}"]
        if root is None:
            ways[0] += f", with {DATA_VARIABLE} naming the folder above"
        if self.hub is not None:
            ways.append(
                f"be online with `datasets` (pip install 'layerskip[bench]') for {self.hub}"
            )
        return f"{self.folder} ({split}) is not here: {', or '.join(ways)} ({reason})"


def _id(row: DataSetRow) -> int:
    number: Any = row.get("task_id")
    try:
        return int(number)
    except (TypeError, ValueError):
        raise ValueError(f"a row's task_id is {number!r}; it must be a number") from None


NEEDED = "`prompt` (a text) or `messages` (role and content)"


def prompt_of(row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    """The prompt, "" where there is none, and the answer that it comes with, if any.

    A conversation that ends with an answer is asked without it.
    """
    messages, answer = row.get("messages") or row.get("prompt"), None
    if messages and isinstance(messages, list) and all(map(is_message, messages)):
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1].get("content")
        more = {name: row[name] for name in CONVERSATION[1:] if row.get(name)}
        return {"messages": messages, **more} if more else messages, answer
    prompt = row.get("prompt")
    return (prompt if isinstance(prompt, str) else ""), None


PROMPTS = (
    "Name three rivers in Europe and say where each of them ends.",
    "Write a Python function that counts the vowels in a text.",
    "Explain in two sentences why the sky is blue.",
    "Summarize in one sentence: The library opens at nine. On Sundays it is closed. Books may be"
    " kept for three weeks, and longer if nobody else has asked for them.",
    "List five things to check before a long bicycle tour.",
    "Translate into French: Where is the nearest railway station?",
    "A train leaves at 14:35 and arrives at 17:10. How long does the journey take?",
    "Write a JSON object that describes a book with title, author, year and two keywords.",
    "What is the difference between a virus and a bacterium?",
    "Rewrite politely: Send me the report now.",
    "Write an SQL query that returns the ten customers with the highest total of orders.",
    "Give me a recipe for a simple tomato soup.",
    "Write the first paragraph of a story that is set in a lighthouse.",
    "Extract the names of persons and places: Marie met Paul in Lisbon before she left for Oslo.",
    "Explain to a child how a bill becomes a law.",
    "Write a shell command that finds all files above 100 MB in a folder.",
    "What are the advantages and disadvantages of working from home?",
    "Write a short e-mail that asks a landlord to repair the heating.",
    "Is this review positive or negative, and why? The screen is bright, but the battery is empty"
    " by noon.",
    "Solve for x: 3x + 7 = 25. Show each step.",
)
