"""Drafts from a text that is like the answers: what most often came next in it.

The text is kept as a table, which a file can hold, so that a text of millions of tokens costs no time at
the start of a program. For each run of 2 to 5 tokens that something followed, the table has the run's
number, in ascending order; the token that most often came next; and its share. (Compare REST, arXiv
2311.08252, and llama.cpp's static lookup.)
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

MAX_MATCH, MIN_MATCH = 5, 2  # tokens of a run
_LEAST_LIKELY = 0.1
_LEAST_OF_TWO = 0.7  # share of what came next: two tokens that stood so once are no match in prose
_FACTOR = 0x9E3779B97F4A7C15  # of the number of a run: odd, and its bits in no order
_BITS = 2**64 - 1
_KIND = "layerskip draft text"
_COLUMNS = {"runs": np.uint64, "after": np.int32, "shares": np.float32}


class Datastore:
    """What most often came next in a text.

    Args:
        runs: uint64 [N], the numbers of runs of tokens, ascending.
        after: int32 [N], the token that most often came next.
        shares: float32 [N], of the times that it did, where one more would have been another token.
    """

    def __init__(
        self, runs: NDArray[np.uint64], after: NDArray[np.int32], shares: NDArray[np.float32]
    ) -> None:
        self._runs, self._after, self._shares = runs, after, shares

    def __len__(self) -> int:
        return len(self._runs)

    @staticmethod
    def of(text: Path | tuple[int, ...] | None, vocab_size: int) -> Datastore | None:
        """The table of some tokens, or in a file: made or read once as long as they stay the same.

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
            raise ValueError(f"the draft text {text} cannot be read: {error.strerror}") from None
        return _of_file(text, vocab_size, changed)

    @classmethod
    def from_tokens(cls, tokens: Sequence[int]) -> Datastore:
        """Count what came next in a text; a million tokens take a second or two."""
        text = np.asarray(tokens, dtype=np.int32)
        single = text.astype(np.uint64) + np.uint64(1)
        runs, parts = single, []
        for n in range(MIN_MATCH, MAX_MATCH + 1):
            if len(text) <= n:
                break
            runs = runs[1:] * np.uint64(_FACTOR) + single[: len(text) - n + 1]
            least = _LEAST_OF_TWO if n == MIN_MATCH else _LEAST_LIKELY
            parts.append(_most_common(runs[:-1], text[n:], least))
        if not parts:
            return cls(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.float32))
        found, after, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(found)
        return cls(found[order], after[order], shares[order])

    def propose(self, tail: Sequence[int], limit: int) -> tuple[list[int], list[float]]:
        """What came next after the last tokens, and after that: tokens, and the share of each.

        They end where all of them together are less likely than one in ten.

        Args:
            tail: the last tokens; no more than `MAX_MATCH` are looked at.
            limit: tokens at most.
        """
        tokens, shares, tail = list[int](), list[float](), [*tail]
        together = 1.0
        while len(tokens) < limit:
            found = self._follows(tail[-MAX_MATCH:])
            together *= 0.0 if found is None else found[1]
            if found is None or together < _LEAST_LIKELY:
                break
            tokens.append(found[0])
            shares.append(found[1])
            tail.append(found[0])
        return tokens, shares

    def _follows(self, tail: Sequence[int]) -> tuple[int, float] | None:
        """What came next after the longest match, and its share; None where there is no match."""
        number, wanted = 0, list[int]()
        for token in reversed(tail):
            number = (number * _FACTOR + token + 1) & _BITS
            wanted.append(number)
        wanted = wanted[MIN_MATCH - 1 :]
        if not wanted or not len(self):
            return None
        places = self._runs.searchsorted(np.array(wanted, dtype=np.uint64)).tolist()
        found = None
        for n, (place, number) in enumerate(zip(places, wanted, strict=True), MIN_MATCH):
            if place < len(self) and int(self._runs[place]) == number:
                found = place
            elif n > MIN_MATCH:  # pairs alone may be missing where more is there
                break
        return None if found is None else (int(self._after[found]), float(self._shares[found]))

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
                    raise ValueError(f"{path} is no draft text: make one with `layerskip index`")
                columns = {name: file.get_tensor(name) for name in _COLUMNS}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the draft text {path} cannot be read: {error}") from None
        if about.get("vocab_size") != str(vocab_size):
            raise ValueError(
                f"the draft text {path} is of a vocabulary of {about.get('vocab_size')} tokens, but this"
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
            raise ValueError(f"the draft text {path} is damaged: make it again")
        return cls(runs, after, shares)


@functools.lru_cache(maxsize=4)
def _of_tokens(tokens: tuple[int, ...]) -> Datastore:
    return Datastore.from_tokens(tokens)


@functools.lru_cache(maxsize=2)
def _of_file(path: Path, vocab_size: int, changed: int) -> Datastore:
    return Datastore.load(path, vocab_size)


def _most_common(
    runs: NDArray[np.uint64], after: NDArray[np.int32], least: float
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.float32]]:
    """Of each run what most often came after it, where its share is large enough; of equal ones any."""
    order = np.lexsort((after, runs))
    runs, after = runs[order], after[order]
    is_new_run = np.concatenate([[True], runs[1:] != runs[:-1]])
    begins = np.flatnonzero(is_new_run | np.concatenate([[True], after[1:] != after[:-1]]))
    times = np.diff(begins, append=len(runs))
    run = np.cumsum(is_new_run)[begins] - 1
    most = np.lexsort((-times, run))
    most = most[np.concatenate([[True], run[most][1:] != run[most][:-1]])]
    shares = (times[most] / (np.bincount(run, times) + 1)).astype(np.float32)
    kept = shares >= least
    places = begins[most][kept]
    return runs[places], after[places], shares[kept]
