"""Rows of text -> tokens and labels; batches of them, padded or packed."""

from __future__ import annotations

import functools
import string
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from layerskip.data.readers import Row
from layerskip.model.tokenizer import template_arguments
from layerskip.recipe.exit_loss import IGNORED_LABEL

_BATCHES_SORTED_TOGETHER = 50


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows, then sorts stretches of many batches by length, so that little is padding.

    The order depends on seed and epoch alone; transformers' own sampler draws from the global
    generator, whose state a resume in a later epoch does not have.

    Args:
        lengths: tokens of every row.
        batch_size: rows of a batch.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        size = self._batch_size
        stretch = size * _BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), stretch):
            together = slice(start, start + stretch)
            order[together] = sorted(order[together], key=lambda row: -self._lengths[row])
        n_whole = len(order) // size
        for number in torch.randperm(n_whole, generator=generator).tolist():
            yield from order[number * size : (number + 1) * size]
        # A short batch must stay the last one: the loader cuts the stream into equal batches.
        yield from order[n_whole * size :]


class LeftOutWarning(UserWarning):
    """Rows, or parts of rows, that nothing is learnt from."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a row becomes tokens and labels.

    A row with `messages` goes through the chat template, with its `tools` and `chat_template_kwargs`
    where it has some; one with the fields of `completion` is prompt and completion; any other must have
    the field of running text. Where templates or a field of text are named that are not the defaults,
    every row must have them.

    Attributes:
        tokenizer: of transformers.
        prompt: template of the prompt.
        completion: template of the completion.
        text_field: name of the field of running text.
        completion_only: prompts have no labels.
        max_length: tokens kept by whoever makes batches of rows.
    """

    tokenizer: Any
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    text_field: str = "text"
    completion_only: bool = True
    max_length: int = 1024

    def __call__(self, where: str, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Tokens and labels of a whole row.

        Raises:
            ValueError: where the row has not the fields needed, named by where it stands.
        """
        try:
            prompt, ids = self._ids(where, row)
        except (TypeError, UnicodeError) as error:  # such as half of an emoji
            raise ValueError(f"{where} cannot be made tokens of: {error}") from error
        labels = list(ids)
        labels[:1] = [IGNORED_LABEL]  # predicted from nothing, and not to be counted either
        if self.completion_only:
            labels[:prompt] = [IGNORED_LABEL] * prompt
        return {"input_ids": ids, "labels": labels}

    def _running(self, text: str, end: list[int]) -> list[int]:
        """Text without a prompt; of an empty one there is nothing to learn, not even that it ends."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids + end if text else []

    def _ids(self, where: str, row: Mapping[str, Any]) -> tuple[int, list[int]]:
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        # Where a template is named, a field that is misspelt must not pass for a row of another kind.
        is_named = (self.prompt, self.completion) != (Encoding.prompt, Encoding.completion)
        if not is_named and self.text_field != Encoding.text_field:
            if not isinstance(text := row.get(self.text_field), str):
                kind = type(text).__name__ if self.text_field in row else "missing"
                raise ValueError(
                    f"{where} has the fields {sorted(row)}; {self.text_field!r} is {kind}, a text is"
                    " needed"
                )
            return 0, self._running(text, end)
        if not is_named and row.get("messages") is not None:  # parquet has the column in all rows
            return self._chat(where, row)
        try:
            completion = _FILLED.vformat(self.completion, (), row)
        except _UNFILLED as error:
            is_there = isinstance(error, TypeError | AttributeError)  # and no text
            if is_named or is_there or not isinstance(row.get(self.text_field), str):
                if not is_named and self.text_field in row and not is_there:
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
        before = self.tokenizer(prompt)["input_ids"]
        after = self._behind(prompt, before, completion, special=True)
        return len(before), before + after + end

    def _behind(self, before: str, ids: list[int], text: str, *, special: bool) -> list[int]:
        """Tokens of what follows a text whose tokens are known.

        SentencePiece puts a space before whatever stands first, so there both are encoded together and
        cut, unless a token reaches over the border.
        """
        if self._leads_with_a_space:
            whole: list[int] = self.tokenizer(before + text, add_special_tokens=special)[
                "input_ids"
            ]
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def _leads_with_a_space(self) -> bool:
        return str((self.tokenizer.tokenize("x") or [""])[0]).startswith("\u2581")

    def _chat(self, where: str, row: Mapping[str, Any]) -> tuple[int, list[int]]:
        messages = row["messages"]
        try:
            given = template_arguments(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        template = functools.partial(self.tokenizer.apply_chat_template, tokenize=False, **given)
        try:
            role = messages[-1]["role"]
            whole = template(messages)
            asked = template(messages[:-1], add_generation_prompt=True)
        except Exception as error:  # a template raises whatever its author chose
            raise ValueError(
                f"{where}: the chat template does not take its messages: {error}"
            ) from error
        if role in ("user", "system", "tool"):
            raise ValueError(f"{where}: the last message is of the role {role!r}, not an answer")
        if not whole.startswith(asked):
            raise ValueError(
                f"{where}: the last message is not an answer to those before it, as the chat template"
                " writes them; prompt and completion as texts need no template"
            )
        before = self.tokenizer(asked, add_special_tokens=False)["input_ids"]
        after = self._behind(asked, before, whole[len(asked) :], special=False)
        return len(before), before + after


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; None where there is none."""
    answer = "an answer 7391"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # there is no template, or it wants other turns
        return None
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if answer not in text:
        return None
    behind = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in behind if token in special), None)


class _Filled(string.Formatter):
    """Fills a template with fields that are texts or numbers: `None` is no text to learn."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if value is None or isinstance(value, Mapping | list | tuple):
            raise TypeError(f"a field of {type(value).__name__} is neither text nor number")
        return super().format_field(value, format_spec)


_FILLED = _Filled()
_UNFILLED = (KeyError, ValueError, IndexError, TypeError, AttributeError)


def _why(error: Exception) -> str:
    """What is wrong with a field that is there."""
    return "" if isinstance(error, KeyError) else f" ({error})"


def encode_rows(
    rows: Iterable[Row], encoding: Encoding, source: str, *, to_pack: bool = False
) -> list[dict[str, list[int]]]:
    """Encode all rows; a `LeftOutWarning` says what is cut off, and which rows are left out for it.

    Args:
        rows: where each stands, and the row.
        encoding: says where rows are cut.
        source: what to call them.
        to_pack: running text is left whole, for `pack_rows` to divide.

    Raises:
        ValueError: for a bad row, no rows at all, or none with a label.
    """
    encoded = [encoding(where, row) for where, row in rows]
    if not encoded:
        raise ValueError(f"{source} has no rows")
    lost: list[int] = []  # tokens of each row that is cut
    for number, row in enumerate(encoded):
        beyond = len(row["input_ids"]) - encoding.max_length
        if beyond > 0 and not (to_pack and _is_running_text(row)):
            encoded[number] = _part(row, 0, encoding.max_length)
            if _has_label(encoded[number]):
                lost.append(beyond)
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
    if lost:
        warnings.warn(
            f"{len(lost)} of {len(encoded)} rows of {source} are longer than max_length ="
            f" {encoding.max_length} tokens and cut there: {sum(lost)} tokens are lost",
            LeftOutWarning,
            stacklevel=2,
        )
    return labelled


def _has_label(row: Mapping[str, list[int]]) -> bool:
    """The first token is predicted from nothing, so its label does not count."""
    return any(label != IGNORED_LABEL for label in row["labels"][1:])


def _part(row: Mapping[str, list[int]], begin: int, end: int) -> dict[str, list[int]]:
    return {name: values[begin:end] for name, values in row.items()}


def _is_running_text(row: Mapping[str, list[int]]) -> bool:
    return IGNORED_LABEL not in row["labels"][1:]


def pack_rows(rows: Sequence[Mapping[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Put documents one after the other into rows of at most `length` tokens.

    A longer document comes in several parts, each a document of its own. `position_ids` start again
    with each document, from which transformers keeps attention within it; the first token of a
    document has no label, or the one before it would have to predict it.
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
            if len(part["input_ids"]) > 1:  # a single token predicts nothing
                yield part


@dataclass(frozen=True)
class Collator:
    """Rows -> tensors [B, T], padded on the right.

    Attributes:
        pad_token_id: token that fills.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Packed rows get no mask: to them each token of padding is a document of its own.

        So it needs no position beyond the first, of which a model may have few.
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
