"""The rows of a run: where they are, as tokens, and those held back to evaluate on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

from layerskip.training.config import TrainConfig
from layerskip.training.data import Encoding, encode_rows, pack_rows
from layerskip.training.rows import Row, local_files, read_rows


def encoding_of(config: TrainConfig, tokenizer: Any) -> Encoding:
    """How rows of a run are encoded."""
    return Encoding(
        tokenizer=tokenizer,
        prompt=config.prompt,
        completion=config.completion,
        text_field=config.text_field,
        completion_only=config.completion_only,
        max_length=config.max_length,
    )


def first_checked(
    read: Callable[[], Iterator[Row]], encoding: Encoding, source: str
) -> Iterator[Row]:
    """The rows; raises ValueError where there is none or the first is bad, before any long work.

    A file is opened again when its rows are wanted, so that none stays open if they never are.
    """
    files, rows = local_files(source), read()
    is_read_again = bool(files) and all(map(os.path.isfile, files))  # which a pipe cannot be
    closed: Any = contextlib.closing(cast(Any, rows)) if is_read_again else contextlib.nullcontext()
    with closed:
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{source} has no rows")
        encoding(*first)
    return read() if is_read_again else itertools.chain([first], rows)


def find_rows(
    config: TrainConfig, encoding: Encoding
) -> tuple[Iterator[Row], Iterator[Row] | None]:
    """Rows to train on, and to evaluate on where those have a source of their own.

    Raises:
        ValueError: a source is not there or has no rows, or its first one is bad.
    """
    for name, is_given, source in (
        ("data_config", config.data_config is not None, config.data),
        ("split", config.split != "train", config.data),
        ("eval_split", config.eval_split is not None, config.eval_data),
    ):
        if is_given and source is not None and local_files(source):
            raise ValueError(f"{name} is for data sets of the hub; {source} is a file")
    read = functools.partial(
        read_rows, config.data, config.split, config.data_config, config.text_field
    )
    rows = first_checked(read, encoding, config.data)
    if config.eval_data is None:
        return rows, None
    trained_on = {os.path.realpath(file) for file in local_files(config.data)}
    for file in local_files(config.eval_data):
        if os.path.realpath(file) in trained_on:
            raise ValueError(f"{file} of eval_data is trained on; give other rows, or eval_rows")
    split = config.eval_split or config.split
    part = config.data_config if config.eval_data == config.data else None
    read = functools.partial(read_rows, config.eval_data, split, part, config.text_field)
    return rows, first_checked(read, encoding, config.eval_data)


def load_rows(
    config: TrainConfig,
    encoding: Encoding,
    train_rows: Iterator[Row],
    eval_rows: Iterator[Row] | None,
) -> tuple[Any, Any]:
    """Encoded rows to train on, and to evaluate on or None."""
    held_out: list[dict[str, list[int]]] = []
    if eval_rows is not None:  # the fewer, whose faults are found soon
        assert config.eval_data is not None
        held_out = encode_rows(eval_rows, encoding, config.eval_data, to_pack=config.packing)
    rows = encode_rows(train_rows, encoding, config.data, to_pack=config.packing)
    if eval_rows is None and config.eval_rows:
        if config.eval_rows >= len(rows):
            raise ValueError(f"eval_rows is {config.eval_rows}, but there are {len(rows)} rows")
        random.Random(config.seed).shuffle(rows)
        rows, held_out = rows[config.eval_rows :], rows[: config.eval_rows]
    if config.packing:
        rows = pack_rows(rows, config.max_length)
        held_out = pack_rows(held_out, config.max_length)
    return _dataset(rows), _dataset(held_out) if held_out else None


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)
