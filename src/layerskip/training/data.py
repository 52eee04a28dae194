"""Rows of text to tokens and labels, and batches of them, padded or packed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import re
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from layerskip.data.readers import Row, local_files, read_rows
from layerskip.model.chat_template import render_chat, template_arguments
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.training.config import TrainConfig

_BATCHES_SORTED_TOGETHER = 50
_PIECE_CHARS = 1 << 18  # tokenized at once: tokenizers take some 260 bytes of memory per byte
# Between words: after a line break, before a space. Runs of white space may be one token.
_BORDERS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows, then sorts groups of many batches by length, to save padding.

    The order depends on seed and epoch alone. transformers' sampler uses the global generator, so its
    order is another one after a resume in a later epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        size = self._batch_size
        group_size = size * _BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), group_size):
            group = slice(start, start + group_size)
            order[group] = sorted(order[group], key=lambda row: -self._lengths[row])
        n_whole = len(order) // size
        for number in torch.randperm(n_whole, generator=generator).tolist():
            yield from order[number * size : (number + 1) * size]
        # A short batch stays the last one: the loader cuts the order into equal batches.
        yield from order[n_whole * size :]


class LeftOutWarning(UserWarning):
    """Rows, or parts of rows, that are not trained on."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Converts rows to tokens and labels.

    A row with `messages` goes through the chat template, with its `tools` and `chat_template_kwargs`
    if any; one with the fields of `completion` is prompt and completion; any other must have the
    field of running text. If templates or a field of text other than the defaults are named, every
    row must have them.

    Attributes:
        tokenizer: of transformers.
        prompt: template of the prompt.
        completion: template of the completion.
        text_field: name of the field of running text.
        completion_only: prompts have no labels.
        max_length: tokens that `encode_rows` keeps of a row.
        cut_texts: tokenize no more of a text than `max_length` tokens can need, since tokenizers take
            some 260 bytes of memory per byte of text.
        to_pack: running text is not cut, but left to `pack_rows`.
    """

    tokenizer: Any
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    text_field: str = "text"
    completion_only: bool = True
    max_length: int = 1024
    cut_texts: bool = False
    to_pack: bool = False

    def __call__(self, where: str, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the tokens and labels of a row.

        Raises:
            ValueError: the row lacks fields; the message begins with its position.
        """
        try:
            prompt, ids = self._ids(where, row)
        except (TypeError, UnicodeError) as error:  # such as a lone surrogate
            raise ValueError(f"{where} cannot be made tokens of: {error}") from error
        labels = list(ids)
        labels[:1] = [IGNORED_LABEL]  # nothing predicts the first token
        if self.completion_only:
            labels[:prompt] = [IGNORED_LABEL] * prompt
        return {"input_ids": ids, "labels": labels}

    def _running(self, text: str, end: list[int]) -> list[int]:
        """Encode text without a prompt; an empty one has no end token either."""
        if not text:
            return []
        return (self._uncut if self.to_pack else self)._tokenize(text) + end

    def _tokenize(self, text: str, **options: Any) -> list[int]:
        """Tokenize a text, or as much of it as gives more than `max_length` tokens."""
        if not self.cut_texts:
            return self._tokenize_in_pieces(text, **options)
        size = 2 * (self.max_length + 1) * self._longest_token
        while True:
            ids = self._uncut._tokenize_in_pieces(text[:size], **options)
            # The last tokens of a part may differ from those of the whole text, but not the first.
            if size >= len(text) or len(ids) > 2 * self.max_length:
                return ids
            size *= 4

    @functools.cached_property
    def _uncut(self) -> Encoding:
        return replace(self, cut_texts=False)

    def _tokenize_in_pieces(self, text: str, **options: Any) -> list[int]:
        """Tokenize all of a text, with no more memory than a piece of it takes."""
        first, *others = pieces(text)
        ids: list[int] = self.tokenizer(first, **options)["input_ids"]
        if not others:
            return ids
        # Special tokens, if any, are around the whole text.
        inner: list[int] = self.tokenizer(first, add_special_tokens=False)["input_ids"]
        n = len(inner)
        start = next((i for i in range(len(ids) - n + 1) if ids[i : i + n] == inner), 0)
        ids, after = ids[: start + n], ids[start + n :]
        for before, piece in itertools.pairwise((first, *others)):
            last = before[-1]
            last_ids = self._tokenize(last, add_special_tokens=False)
            ids += self._continuation(last, last_ids, piece, special=False)
        return ids + after

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def _ids(self, where: str, row: Mapping[str, Any]) -> tuple[int, list[int]]:
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        # With a named template, a row with a misspelt field must not pass for running text.
        is_named = (self.prompt, self.completion) != (Encoding.prompt, Encoding.completion)
        if not is_named and self.text_field != Encoding.text_field:
            if not isinstance(text := row.get(self.text_field), str):
                kind = type(text).__name__ if self.text_field in row else "missing"
                raise ValueError(
                    f"{where} has the fields {sorted(row)}; {self.text_field!r} is {kind}, a text is"
                    " needed"
                )
            return 0, self._running(text, end)
        if not is_named and row.get("messages") is not None:  # None: a column of parquet
            return self._chat(where, row)
        try:
            completion = _FILLED.vformat(self.completion, (), row)
        except _UNFILLED as error:
            is_other_type = isinstance(error, TypeError | AttributeError)
            if is_named or is_other_type or not isinstance(row.get(self.text_field), str):
                if not is_named and self.text_field in row and not is_other_type:
                    kind = type(row[self.text_field]).__name__
                    raise ValueError(
                        f"{where}: its {self.text_field} is {kind}, not a text"
                    ) from None
                others = "" if is_named else f", 'messages', or {self.text_field!r}"
                raise ValueError(
                    f"{where} has the fields {sorted(row)}; needed are those of {self.completion!r} "
                    f"and {self.prompt!r}{others}{_why(error)}"
                ) from None
            return 0, self._running(row[self.text_field], end)
        try:
            prompt = _FILLED.vformat(self.prompt, (), row)
        except _UNFILLED as error:
            raise ValueError(
                f"{where} has the fields {sorted(row)}, not those of {self.prompt!r}{_why(error)}"
            ) from None
        prompt_ids = self._tokenize(prompt)
        completion_ids = self._continuation(prompt, prompt_ids, completion, special=True)
        return len(prompt_ids), prompt_ids + completion_ids + end

    def _continuation(self, before: str, ids: list[int], text: str, *, special: bool) -> list[int]:
        """Tokenize a text that follows another one, whose tokens are `ids`.

        SentencePiece adds a space in front of the first word. With it both texts are tokenized together
        and split, unless a token crosses the border.
        """
        if self._adds_a_space:
            whole = self._tokenize(before + text, add_special_tokens=special)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._tokenize(text, add_special_tokens=False)

    @functools.cached_property
    def _adds_a_space(self) -> bool:
        return str((self.tokenizer.tokenize("x") or [""])[0]).startswith("\u2581")

    def _chat(self, where: str, row: Mapping[str, Any]) -> tuple[int, list[int]]:
        messages = row["messages"]
        try:
            arguments = template_arguments(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        def template(turns: Any, **options: Any) -> str:
            return render_chat(self.tokenizer, turns, **arguments, **options)

        try:
            role = messages[-1]["role"]
            whole = template(messages)
            prompt = template(messages[:-1], add_generation_prompt=True)
        except Exception as error:  # templates raise any exception
            raise ValueError(
                f"{where}: the chat template does not take its messages: {error}"
            ) from error
        if role in ("user", "system", "tool"):
            raise ValueError(f"{where}: the last message is of the role {role!r}, not an answer")
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the last message is not an answer to those before it, as the chat template"
                " writes them; prompt and completion as texts need no template"
            )
        prompt_ids = self._tokenize(prompt, add_special_tokens=False)
        answer = whole[len(prompt) :]
        return len(prompt_ids), prompt_ids + self._continuation(
            prompt, prompt_ids, answer, special=False
        )


def pieces(text: str) -> list[str]:
    """Divide a text into pieces of at most `_PIECE_CHARS` characters.

    They end after a line break, else before a space, where no tokenizer in use has a token across.
    """
    parts, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        for border in _BORDERS:
            ends = [match.end() for match in border.finditer(text, start + _PIECE_CHARS // 2, end)]
            if ends:
                end = ends[-1]
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that the chat template puts after an answer, or None."""
    answer = "an answer 7391"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    try:
        text = render_chat(tokenizer, turns)
    except Exception:  # no template, or one that takes other turns
        return None
    if answer not in text:
        return None
    special = _special_tokens(tokenizer)
    following = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in following if token in special), None)


def ending_of_prompts(rows: Iterable[Mapping[str, list[int]]], tokenizer: Any) -> str:
    """Return a line break if the prompts of all rows end in one, else "".

    The prompt of an encoded row is what comes before its first label. One with special tokens was
    rendered by a chat template, which is applied at inference too.
    """
    special = _special_tokens(tokenizer)
    n_prompts = 0
    for row in rows:
        labels = row["labels"]
        size = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
        prompt = row["input_ids"][:size]
        if not special.isdisjoint(prompt[1:]) or not tokenizer.decode(prompt).endswith("\n"):
            return ""
        n_prompts += 1
    return "\n" if n_prompts else ""


def _special_tokens(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids} | added


_TOO_WIDE = re.compile(r"\d{5}")


class _Filled(string.Formatter):
    """Fills a template with fields that are texts or numbers, but not None."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if value is None or isinstance(value, Mapping | list | tuple):
            raise TypeError(f"a field of {type(value).__name__} is neither text nor number")
        if _TOO_WIDE.search(format_spec):
            raise ValueError(f"the width of {format_spec[:20]!r} has more than four digits")
        return super().format_field(value, format_spec)


_FILLED = _Filled()
_UNFILLED = (KeyError, ValueError, IndexError, TypeError, AttributeError)


def _why(error: Exception) -> str:
    """Return the reason, unless a field is missing."""
    return "" if isinstance(error, KeyError) else f" ({error})"


def encode_rows(
    rows: Iterable[Row], encoding: Encoding, source: str, *, to_pack: bool = False
) -> list[dict[str, list[int]]]:
    """Encode all rows and cut them to `max_length`; a `LeftOutWarning` counts cut and dropped rows.

    Args:
        rows: position and fields of each.
        encoding: converts them.
        source: name of the data, for messages.
        to_pack: running text is not cut, but left to `pack_rows`.

    Raises:
        ValueError: a bad row, no rows at all, or none with a label.
    """
    encoding = replace(encoding, cut_texts=True, to_pack=to_pack)
    n_cut = 0
    encoded = []
    for where, row in rows:
        ids = encoding(where, row)
        if len(ids["input_ids"]) > encoding.max_length and not (to_pack and _is_running_text(ids)):
            ids = _part(ids, 0, encoding.max_length)
            n_cut += _has_label(ids)
        encoded.append(ids)
    if not encoded:
        raise ValueError(f"{source} has no rows")
    labelled = [row for row in encoded if _has_label(row)]
    if not labelled:
        raise ValueError(
            f"no row of {source} has a label within max_length = {encoding.max_length} tokens: "
            "prompts may be longer than that, or completions empty"
        )
    if left_out := len(encoded) - len(labelled):
        warnings.warn(
            f"{left_out} of {len(encoded)} rows of {source} are left out: their labels lie beyond"
            f" max_length = {encoding.max_length} tokens, or there are none",
            LeftOutWarning,
            stacklevel=2,
        )
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(encoded)} rows of {source} are longer than max_length ="
            f" {encoding.max_length} tokens and cut there",
            LeftOutWarning,
            stacklevel=2,
        )
    return labelled


def _has_label(row: Mapping[str, list[int]]) -> bool:
    """Return True for a label after the first token, which nothing predicts."""
    return any(label != IGNORED_LABEL for label in row["labels"][1:])


def _part(row: Mapping[str, list[int]], begin: int, end: int) -> dict[str, list[int]]:
    return {name: values[begin:end] for name, values in row.items()}


def _is_running_text(row: Mapping[str, list[int]]) -> bool:
    return IGNORED_LABEL not in row["labels"][1:]


def pack_rows(rows: Sequence[Mapping[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Concatenate documents into rows of at most `length` tokens.

    A longer document is split into several. `position_ids` restart with each document, by which
    transformers keeps attention within it; its first token has no label, or the previous document
    would have to predict it.
    """
    packed: list[dict[str, list[int]]] = []
    for row in _parts(rows, length):
        tokens = len(row["input_ids"])
        if not packed or len(packed[-1]["input_ids"]) + tokens > length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += row["input_ids"]
        packed[-1]["labels"] += [IGNORED_LABEL, *row["labels"][1:]]
        packed[-1]["position_ids"] += range(tokens)
    return packed


def _parts(
    rows: Iterable[Mapping[str, list[int]]], length: int
) -> Iterator[Mapping[str, list[int]]]:
    for row in rows:
        for begin in range(0, len(row["input_ids"]), length):
            part = _part(row, begin, begin + length)
            if len(part["input_ids"]) > 1:  # a single token has no label
                yield part


@dataclass(frozen=True)
class Collator:
    """Batches rows as tensors [B, T], padded on the right.

    Attributes:
        pad_token_id: token of the padding.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Pad and stack the rows.

        Packed rows get no mask: each token of padding is a document of its own, at position 0.
        """
        width = max(len(row["input_ids"]) for row in rows)
        gaps = [width - len(row["input_ids"]) for row in rows]
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL, "position_ids": 0}
        batch = {
            name: [[*row[name], *[fill] * gap] for row, gap in zip(rows, gaps, strict=True)]
            for name, fill in fills.items()
            if name in rows[0]
        }
        if "position_ids" not in batch:
            batch["attention_mask"] = [[1] * (width - g) + [0] * g for g in gaps]
        return {name: torch.tensor(values) for name, values in batch.items()}


def encoding_of(config: TrainConfig, tokenizer: Any) -> Encoding:
    """Return the encoding of a run's rows."""
    return Encoding(
        tokenizer=tokenizer,
        prompt=config.prompt,
        completion=config.completion,
        text_field=config.text_field,
        completion_only=config.completion_only,
        max_length=config.max_length,
    )


def check_first_rows(
    read: Callable[[], Iterator[Row]], encoding: Encoding, source: str, eval_rows: int = 0
) -> Iterator[Row]:
    """Return the rows, after checking before any long work that there are enough, and the first one.

    A file is closed and opened again later, so that none stays open if the run ends before.
    """
    files, rows = local_files(source), read()
    is_rereadable = bool(files) and all(map(os.path.isfile, files))  # a pipe is not
    with contextlib.ExitStack() as stack:
        if is_rereadable and hasattr(rows, "close"):
            stack.callback(rows.close)
        first = list(itertools.islice(rows, eval_rows + 1))
        if not first:
            raise ValueError(f"{source} has no rows")
        check_eval_rows(eval_rows, len(first), source)
        replace(encoding, cut_texts=True)(*first[0])
    return read() if is_rereadable else itertools.chain(first, rows)


def check_eval_rows(eval_rows: int, num_rows: int, source: str) -> None:
    """Raise ValueError where no row would be left to train on."""
    if eval_rows and eval_rows >= num_rows:
        raise ValueError(
            f"--eval-rows is {eval_rows}, but {source} has {num_rows} rows: give fewer"
        )


def find_rows(
    config: TrainConfig, encoding: Encoding
) -> tuple[Iterator[Row], Iterator[Row] | None]:
    """Open the rows to train on, and those of `eval_data` or None.

    Raises:
        ValueError: a source is missing or has too few rows, or its first one is bad.
    """
    for name, is_set, source in (
        ("data_config", config.data_config is not None, config.data),
        ("split", config.split != "train", config.data),
        ("eval_split", config.eval_split is not None, config.eval_data),
    ):
        if is_set and source is not None and local_files(source):
            raise ValueError(f"{name} is for data sets of the hub; {source} is a file")
    read_split = functools.partial(
        read_rows, config.data, config.split, config.data_config, config.text_field
    )
    rows = check_first_rows(read_split, encoding, config.data, config.eval_rows)
    if config.eval_data is None:
        return rows, None
    train_files = {os.path.realpath(file) for file in local_files(config.data)}
    for file in local_files(config.eval_data):
        if os.path.realpath(file) in train_files:
            raise ValueError(f"{file} of eval_data is trained on; give other rows, or eval_rows")
    split = config.eval_split or config.split
    data_config = config.data_config if config.eval_data == config.data else None
    read_split = functools.partial(
        read_rows, config.eval_data, split, data_config, config.text_field
    )
    return rows, check_first_rows(read_split, encoding, config.eval_data)


def load_rows(
    config: TrainConfig,
    encoding: Encoding,
    train_rows: Iterator[Row],
    eval_rows: Iterator[Row] | None,
) -> tuple[Any, Any]:
    """Encode the rows to train on, and those to evaluate on or None."""
    held_out: list[dict[str, list[int]]] = []
    if eval_rows is not None:  # first, because they are fewer
        assert config.eval_data is not None
        held_out = encode_rows(eval_rows, encoding, config.eval_data, to_pack=config.packing)
    rows = encode_rows(train_rows, encoding, config.data, to_pack=config.packing)
    if eval_rows is None and config.eval_rows:
        check_eval_rows(config.eval_rows, len(rows), config.data)
        random.Random(config.seed).shuffle(rows)
        rows, held_out = rows[config.eval_rows :], rows[: config.eval_rows]
    if config.packing:
        rows = pack_rows(rows, config.max_length)
        held_out = pack_rows(held_out, config.max_length)
    return _dataset(rows), _dataset(held_out) if held_out else None


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)
