"""Readers of rows, prompts and texts: local files, data sets of the hub, and standard data sets.

Training, benchmarks, tuning and the command line read their data here. Every read has a bound, so that a
device or a damaged archive ends in one line and not in full memory.
"""

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
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Row = tuple[str, Mapping[str, Any]]
"""Location of a row, such as 'train.tsv:17', and its fields."""

MAX_ROW_CHARS = 2**23  # a tokenizer takes some 260 bytes of memory for each of them
MAX_TEXT_CHARS = 2**28  # of a text, or of all prompts of a file
MAX_JSON_CHARS = 2**31  # of a JSON array, which cannot be read row by row
_PARQUET_BATCH_ROWS = 1000
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
COMPRESSED = tuple(_OPENERS)
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


def local_files(source: str) -> list[str]:
    """Return the local files that a source names; none for a data set of the hub.

    Raises:
        ValueError: an environment variable in its name is not set.
    """
    source = _expand(source)
    if source.startswith("$"):
        raise ValueError(f"{source}: set this environment variable to the folder of the data")
    return [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))


def _expand(source: str) -> str:
    return os.path.expanduser(os.path.expandvars(source))


def is_table(file: str) -> bool:
    """Return True for a file of rows, False for a file that is one text."""
    suffix = _without_compression(Path(file)).suffix
    return suffix in _SUFFIXES and suffix != ".txt"


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 file, compressed (.gz, .xz) or not, with a byte order mark or without.

    Raises:
        ValueError: it cannot be read, or, while it is read, is cut off, damaged, or not UTF-8.
    """
    try:
        with _OPENERS.get(path.suffix, open)(
            path, "rt", encoding="utf-8-sig", newline=newline
        ) as file:
            yield file
    except UnicodeDecodeError as error:  # its position is relative to a part of the file
        line = _first_undecodable_line(path)
        raise ValueError(f"{path.name}:{line} is no text in UTF-8: {error.reason}") from error
    except (*_READ_ERRORS, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error


def _first_undecodable_line(path: Path) -> int:
    def is_text(line: bytes) -> bool:
        with contextlib.suppress(UnicodeDecodeError):
            line.decode()
            return True
        return False

    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        return 1 + sum(1 for _ in itertools.takewhile(is_text, file))


def _lines(file: TextIO, name: str) -> Iterator[str]:
    """The lines of a file, each of at most MAX_ROW_CHARS characters."""
    for number in itertools.count(1):
        line = file.readline(MAX_ROW_CHARS + 1)
        _check_row_length(len(line), f"{name}:{number}")
        if not line:
            return
        yield line


def _check_row_length(length: int, where: str) -> None:
    if length > MAX_ROW_CHARS:
        raise ValueError(
            f"{where} has more than {MAX_ROW_CHARS:,} characters, which is the most of one row:"
            " split it"
        )


def _read_all(file: TextIO, name: str, limit: int = MAX_TEXT_CHARS) -> str:
    text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"{name} has more than {limit:,} characters: split it")
    return text


def read_text_file(path: Path) -> str:
    """Return the text of a file, compressed (.gz, .xz) or not.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or has more than MAX_TEXT_CHARS characters.
    """
    with open_text(path) as file:
        return _read_all(file, str(path))


def read_text(source: str, max_words: int | None = None) -> str:
    """Return the text of a file, or the test part of WikiText-2 under the name `wikitext2`.

    Args:
        source: the file or the name. WikiText-2 is looked for as other standard data sets are.
        max_words: keep only the text up to the end of this word.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(source).expanduser()
    is_wikitext = source == WIKITEXT.folder and not path.exists()
    text = _wikitext() if is_wikitext else read_text_file(path)
    if max_words is not None:
        words = re.finditer(r"\S+", text)
        ends = [match.end() for _, match in zip(range(max_words), words, strict=False)]
        text = text[: ends[-1]] if ends else ""
    return text


def _wikitext() -> str:
    if files := WIKITEXT.local_files("test"):
        return read_text_file(files[0])
    # The hub's rows are empty where the text has a line of one space.
    return "".join(row["text"] or " \n" for row in WIKITEXT.rows("test"))


CONVERSATION = ("messages", "tools", "chat_template_kwargs")
NEEDED = "`prompt` (a text) or `messages` (role and content)"


def is_message(value: Any) -> bool:
    """Return True for a dict with a role and with content, or with tool calls in its place."""
    return (
        isinstance(value, Mapping)
        and "role" in value
        and not {"content", "tool_calls"}.isdisjoint(value)
    )


def prompt_of(row: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the prompt of a row ("" if it has none), and its answer or None.

    The last message of a conversation is its answer if the assistant wrote it.
    """
    messages, answer = row.get("messages") or row.get("prompt"), None
    if messages and isinstance(messages, list) and all(map(is_message, messages)):
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1].get("content")
        more = {name: row[name] for name in CONVERSATION[1:] if row.get(name)}
        return {"messages": messages, **more} if more else messages, answer
    prompt = row.get("prompt")
    return (prompt if isinstance(prompt, str) else ""), None


def read_prompts(path: Path) -> list[Any]:
    """Return the prompts of a file: each a text, a list of token ids or a conversation.

    Args:
        path: a .jsonl file with a field "prompt" or "messages" in each line, else a file with one
            prompt in each line; compressed (.gz, .xz) or not.

    Raises:
        ValueError: it cannot be read, a line has no prompt, or there is none at all.
    """
    plain = _without_compression(path)
    if plain.suffix.lower() == ".json":
        raise ValueError(
            f"{path} may be one JSON document: name it .jsonl, with a prompt in each line"
        )
    prompts: list[Any] = []
    with open_text(path) as file:
        lines = _bounded(_lines(file, plain.name), str(path))
        if plain.suffix.lower() == ".jsonl":
            prompts = [_needed_prompt(where, row) for where, row in _json_lines(lines, plain.name)]
        else:
            prompts = [line.rstrip("\n") for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _bounded(lines: Iterable[str], name: str) -> Iterator[str]:
    total = 0
    for line in lines:
        total += len(line)
        if total > MAX_TEXT_CHARS:
            raise ValueError(f"{name} has more than {MAX_TEXT_CHARS:,} characters: split it")
        yield line


def _needed_prompt(where: str, row: Mapping[str, Any]) -> Any:
    prompt: Any = prompt_of(row)[0] or row.get("prompt")
    if not isinstance(prompt, str | list | dict) or not prompt:
        raise ValueError(f"{where}: {NEEDED} is needed")
    return prompt


def read_rows(
    source: str, split: str = "train", config: str | None = None, text_field: str = "text"
) -> Iterator[Row]:
    """Return the rows of local files or of a hub data set, each with its location.

    The source is looked up at once, the rows are read one by one.

    Args:
        source: a file, compressed (.gz, .xz) or not, a pattern of several (`data/*_train.tsv.xz`,
            taken in alphabetical order), or a hub id. `$NAME` is replaced from the environment.
        split: of a hub data set.
        config: the part of a hub data set that has several.
        text_field: name of the field that holds a document of a .txt file.

    Raises:
        ValueError: a file of unknown kind, a data set that is not available, or a bad row (named by
            its line).
    """
    files = local_files(source)
    source = _expand(source)
    if files:
        return itertools.chain.from_iterable([_file_rows(Path(f), text_field) for f in files])
    if Path(source).suffix in (*_SUFFIXES, *COMPRESSED):
        raise ValueError(f"the data file {source} does not exist")
    return _hub_rows(source, split, config)


def _file_rows(path: Path, text_field: str) -> Iterator[Row]:
    plain = _without_compression(path)
    if plain.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is of no known kind; known are {', '.join(_SUFFIXES)}")
    return _parquet(path) if plain.suffix == ".parquet" else _text_rows(path, plain, text_field)


def _text_rows(path: Path, plain: Path, text_field: str) -> Iterator[Row]:
    parsers: dict[str, Callable[[TextIO, str], Iterator[Row]]] = {
        ".jsonl": lambda file, name: _json_lines(_lines(file, name), name),
        ".json": _json_array,
        ".csv": _table,
        ".tsv": _table,
        ".txt": functools.partial(_paragraphs, field=text_field),
    }
    # Tables and JSON keep the line breaks inside of fields; in running text all become "\n".
    with open_text(path, newline=None if plain.suffix == ".txt" else "") as file:
        for where, row in parsers[plain.suffix](file, plain.name):
            _check_row_length(sum(len(v) for v in row.values() if isinstance(v, str)), where)
            yield where, row


def _json_lines(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # an integer of too many digits is not a JSONDecodeError
            reason = getattr(error, "msg", error)
            raise ValueError(f"{name}:{number} is not JSON: {reason}") from None
        except RecursionError:
            raise ValueError(f"{name}:{number} is nested too deeply") from None
        yield f"{name}:{number}", _fields_of(row, f"{name}:{number}")


def _json_array(file: TextIO, name: str) -> Iterator[Row]:
    text = _read_all(file, name, MAX_JSON_CHARS)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines with the suffix of a JSON array
            yield from _json_lines(io.StringIO(text), name)
            return
        raise ValueError(f"{name}:{error.lineno} is not JSON: {error.msg}") from None
    except ValueError as error:  # an integer of too many digits
        raise ValueError(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if isinstance(rows, dict) and "\n" not in text.strip():  # JSON lines, of which there is one
        rows, where = [rows], f"{name}:"
    else:
        where = f"{name}, row "
    if not isinstance(rows, list):
        raise ValueError(f"{name} must hold a list of rows")
    for number, row in enumerate(rows, 1):
        yield f"{where}{number}", _fields_of(row, f"{where}{number}")


def _fields_of(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with fields")
    return row


def _table(file: TextIO, name: str) -> Iterator[Row]:
    # Tab-separated files quote nothing: a quotation mark in them is text.
    is_tsv = name.endswith(".tsv")
    csv.field_size_limit(MAX_ROW_CHARS)
    reader = csv.DictReader(
        _lines(file, name),
        delimiter="\t" if is_tsv else ",",
        quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
        strict=True,  # an unclosed quotation mark would take in the rows after it
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
        where = f"{name}:{reader.line_num - breaks}"  # the line in which the row begins
        if None in row or None in row.values():
            columns = len(reader.fieldnames or ())
            raise ValueError(f"{where} does not have the {columns} columns of the first line")
        yield where, row


def _paragraphs(file: TextIO, name: str, field: str) -> Iterator[Row]:
    """Documents of a text file, which empty lines separate."""
    start, length, lines = 1, 0, list[str]()
    for number, line in enumerate(itertools.chain(_lines(file, name), [""]), 1):
        if line.strip():
            start, length = (start, length + len(line)) if lines else (number, len(line))
            _check_row_length(length, f"{name}:{start}")
            lines.append(line)
        elif lines:
            yield f"{name}:{start}", {field: "".join(lines)}
            lines = []


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow, parquet = _package("pyarrow"), _package("pyarrow.parquet")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            batches = parquet.ParquetFile(file).iter_batches(_PARQUET_BATCH_ROWS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{path.name}:{i}", _without_nones(row)) for i, row in enumerate(rows, 1))
    except (*_READ_ERRORS, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as parquet: {reason}") from error


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
    return ((f"{source}:{i}", _without_nones(row)) for i, row in enumerate(rows, 1))


def _without_nones(value: Any) -> Any:
    """A row without the fields that are None: a column of a table is there in all rows."""
    if isinstance(value, Mapping):
        return {name: _without_nones(part) for name, part in value.items() if part is not None}
    return [_without_nones(part) for part in value] if isinstance(value, list) else value


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError("this needs `datasets`: pip install 'layerskip[train]'") from None


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets inside the block."""
    import datasets
    from transformers.utils import logging

    transformers_bars = logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if transformers_bars:
            logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()


DataSetRow = Mapping[str, Any]
DATA_VARIABLE = "LAYERSKIP_DATA"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Location of a standard data set: in a folder of $LAYERSKIP_DATA, else on the hub.

    Attributes:
        folder: the folder's name.
        files: split -> pattern of its files there, each compressed (.gz, .xz) or not.
        hub: hub id, None if the hub does not have it.
        config: part of the hub's data set.
        hub_splits: split -> its name on the hub, if that differs.
        origin: where its authors publish it.
        ids: split -> ids of its rows, if one file holds all splits.
    """

    folder: str
    files: Mapping[str, str]
    hub: str | None = None
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    origin: str
    ids: Mapping[str, range] = field(default_factory=dict)

    def rows(self, split: str, data: str | None = None) -> list[DataSetRow]:
        """Return all rows of a split.

        Args:
            split: "test", "train", "validation" or "prompt".
            data: the folder of data sets; None for that of $LAYERSKIP_DATA.

        Raises:
            ValueError: it is not available; the message says how to get it.
        """
        if split not in self.files:
            raise ValueError(f"{self.folder} has no {split} split")
        if files := self.local_files(split, data):
            rows = [row for file in files for _, row in read_rows(str(file))]
            return [row for row in rows if split not in self.ids or _id(row) in self.ids[split]]
        try:
            if self.hub is None:
                raise ValueError("it is not on the hub")
            name = self.hub_splits.get(split, split)
            return [row for _, row in read_rows(self.hub, name, config=self.config)]
        except ValueError as error:
            raise ValueError(self._advice(split, _data_folder(data), str(error))) from None

    def local_files(self, split: str, data: str | None = None) -> list[Path]:
        """Return a split's local files, each in one form only: `gunzip -k` leaves both."""
        if (root := _data_folder(data)) is None:
            return []
        pattern = self.files[split].removesuffix("*")
        by_name: dict[str, Path] = {}
        for suffix in (*COMPRESSED, ""):
            for path in Path(root, self.folder).glob(pattern + suffix):
                by_name[path.name.removesuffix(suffix)] = path
        return [by_name[name] for name in sorted(by_name)]

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


def _data_folder(data: str | None) -> str | None:
    return os.path.expanduser(data or os.environ.get(DATA_VARIABLE, "")) or None


def _id(row: DataSetRow) -> int:
    number: Any = row.get("task_id")
    try:
        return int(number)
    except (TypeError, ValueError):
        raise ValueError(f"a row's task_id is {number!r}; it must be a number") from None


WIKITEXT = DataSet(
    folder="wikitext2",
    files={"test": "test.txt*"},
    hub="Salesforce/wikitext",
    config="wikitext-2-v1",
    origin="https://huggingface.co/datasets/Salesforce/wikitext",
)

# Prompts of many kinds to tune on, for users who name none.
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
