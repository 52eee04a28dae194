"""The n-gram datastore: the most frequent continuations in a text that resembles the answers.

It is a table in a file, so that a text of millions of tokens costs no time at the start of a program.
For each n-gram of 2 to 5 tokens, the table has its hash, in ascending order; the token that most often
followed; and that token's share. (Compare REST, arXiv 2311.08252, and llama.cpp's static lookup.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from layerskip.fileio import replace

MAX_MATCH, MIN_MATCH = 5, 2  # tokens of an n-gram
_MIN_SHARE = 0.1
_FACTOR = 0x9E3779B97F4A7C15  # of the hash: odd, with irregular bits
_BITS = 2**64 - 1
_KIND = "layerskip draft text"
_COLUMNS = {"runs": np.uint64, "after": np.int32, "shares": np.float32}


class Datastore:
    """A table of continuations.

    Args:
        runs: uint64 [N], the hashes of n-grams, ascending.
        after: int32 [N], the token that most often followed.
        shares: float32 [N], its share of the occurrences, as if there were one more with another token.
    """

    def __init__(
        self, runs: NDArray[np.uint64], after: NDArray[np.int32], shares: NDArray[np.float32]
    ) -> None:
        self._runs, self._after, self._shares = runs, after, shares

    def __len__(self) -> int:
        return len(self._runs)

    @staticmethod
    def of(text: Path | tuple[int, ...] | None, vocab_size: int) -> Datastore | None:
        """Return the table of some tokens, or of a file; the last few are cached.

        Raises:
            ValueError: the file has no such table, or one of another vocabulary.
        """
        if text is None:
            return None
        if isinstance(text, tuple):
            return _of_tokens(text)
        try:
            changed = text.stat().st_mtime_ns
        except OSError as error:
            raise ValueError(f"the datastore {text} cannot be read: {error.strerror}") from None
        return _of_file(text, vocab_size, changed)

    @classmethod
    def from_tokens(cls, tokens: Sequence[int]) -> Datastore:
        """Build the table of a text; a million tokens take a second or two."""
        text = np.asarray(tokens, dtype=np.int32)
        single = text.astype(np.uint64) + np.uint64(1)
        runs, parts = single, []
        for n in range(MIN_MATCH, MAX_MATCH + 1):
            if len(text) <= n:
                break
            runs = runs[1:] * np.uint64(_FACTOR) + single[: len(text) - n + 1]
            parts.append(_most_common(runs[:-1], text[n:]))
        if not parts:
            return cls(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.float32))
        found, after, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(found)
        return cls(found[order], after[order], shares[order])

    def propose(self, tail: Sequence[int], limit: int) -> tuple[list[int], list[float]]:
        """Return the most frequent continuation of the last tokens, and the share of each of its tokens.

        It ends where the product of the shares falls below 0.1.

        Args:
            tail: the last tokens, of which `MAX_MATCH` are used.
            limit: maximum number of tokens.
        """
        tokens, shares, tail = list[int](), list[float](), [*tail]
        product = 1.0
        while len(tokens) < limit:
            match = self._follows(tail[-MAX_MATCH:])
            product *= 0.0 if match is None else match[1]
            if match is None or product < _MIN_SHARE:
                break
            tokens.append(match[0])
            shares.append(match[1])
            tail.append(match[0])
        return tokens, shares

    def _follows(self, tail: Sequence[int]) -> tuple[int, float] | None:
        """Return the token that followed the longest match, and its share; None without a match."""
        number, hashes = 0, list[int]()
        for token in reversed(tail):
            number = (number * _FACTOR + token + 1) & _BITS
            hashes.append(number)
        hashes = hashes[MIN_MATCH - 1 :]
        if not hashes or not len(self):
            return None
        positions = self._runs.searchsorted(np.array(hashes, dtype=np.uint64)).tolist()
        match = None
        for position, number in zip(positions, hashes, strict=True):
            if position < len(self) and int(self._runs[position]) == number:
                match = position
        return None if match is None else (int(self._after[match]), float(self._shares[match]))

    def save(self, path: Path, vocab_size: int) -> None:
        """Write the table as safetensors, beside its place first.

        Raises:
            OSError: it cannot be written.
        """
        columns: dict[str, NDArray[Any]] = {
            "runs": self._runs,
            "after": self._after,
            "shares": self._shares,
        }
        replace(path, save(columns, {"kind": _KIND, "vocab_size": str(vocab_size)}))

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Datastore:
        """Read what `save` has written.

        Raises:
            ValueError: it is no such file, or of another vocabulary.
        """
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("kind") != _KIND or {*file.keys()} != _COLUMNS.keys():
                    raise ValueError(f"{path} is no datastore: make one with `layerskip index`")
                columns = {name: file.get_tensor(name) for name in _COLUMNS}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the datastore {path} cannot be read: {error}") from None
        if about.get("vocab_size") != str(vocab_size):
            raise ValueError(
                f"the datastore {path} is of a vocabulary of {about.get('vocab_size')} tokens, but this"
                f" model has {vocab_size}: make one with its own tokenizer"
            )
        runs, after, shares = (columns[name] for name in _COLUMNS)
        is_whole = (
            all(columns[name].dtype == dtype for name, dtype in _COLUMNS.items())
            and runs.ndim == 1
            and runs.shape == after.shape == shares.shape
            and bool((runs[1:] >= runs[:-1]).all())
            and bool(((after >= 0) & (after < vocab_size)).all())
            and bool(((shares > 0) & (shares < 1)).all())
        )
        if not is_whole:
            raise ValueError(f"the datastore {path} is damaged: make it again")
        return cls(runs, after, shares)


@functools.lru_cache(maxsize=4)
def _of_tokens(tokens: tuple[int, ...]) -> Datastore:
    return Datastore.from_tokens(tokens)


@functools.lru_cache(maxsize=2)
def _of_file(path: Path, vocab_size: int, changed: int) -> Datastore:
    return Datastore.load(path, vocab_size)


def _most_common(
    runs: NDArray[np.uint64], after: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.float32]]:
    """Return for each n-gram its most frequent continuation, where the share is large enough."""
    order = np.lexsort((after, runs))
    runs, after = runs[order], after[order]
    is_new_run = np.concatenate([[True], runs[1:] != runs[:-1]])
    begins = np.flatnonzero(is_new_run | np.concatenate([[True], after[1:] != after[:-1]]))
    times = np.diff(begins, append=len(runs))
    run = np.cumsum(is_new_run)[begins] - 1
    most = np.lexsort((-times, run))
    most = most[np.concatenate([[True], run[most][1:] != run[most][:-1]])]
    shares = (times[most] / (np.bincount(run, times) + 1)).astype(np.float32)
    kept = shares >= _MIN_SHARE
    positions = begins[most][kept]
    return runs[positions], after[positions], shares[kept]
