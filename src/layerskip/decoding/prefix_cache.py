"""Keys and values that a prompt shares with earlier texts are computed once.

`PrefixCache` is for one answer after another, `PrefixPool` for many at the same time.
"""

import threading
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from layerskip.model import Decoder, KVCache

_ROOM = 1024  # spare positions, so that the next turn most often fits into the same cache


class PrefixCache:
    """The KV cache of the last answer, reused by the next prompt as far as both texts begin alike.

    Passed to one answer after another (`LayerSkipModel.answer(prompt, prefix=prefix)`), it changes none
    of them beyond rounding, since keys and values do not depend on later tokens. One answer at a time:
    the next one takes the cache over, and an unfinished one cannot go on, in whichever threads they
    run. It holds the memory of one cache, and of two while a longer text moves to a larger one.
    """

    def __init__(self) -> None:
        self._decoder: Decoder | None = None
        self._cache: KVCache | None = None
        self._text: list[int] = []  # the cache holds keys and values of all but the last token
        self._n_layers = 0  # number of layers that have run
        self._owner: object = None
        self._in_step = False  # the owner is writing to the cache
        self._lock = threading.RLock()  # reentrant: the garbage collector may end an answer

    def cache_for(
        self, decoder: Decoder, prompt: Sequence[int], capacity: int, n_layers: int, answer: object
    ) -> KVCache:
        """Return a cache for an answer; its length is the number of prompt tokens that it holds already.

        At least the last token is left to be run.

        Args:
            decoder: the model.
            prompt: token ids.
            capacity: positions of prompt and answer.
            n_layers: layers that will run over the prompt.
            answer: the new owner of the cache.
        """
        with self._lock:
            before, shared, is_written = self._cache, 0, self._in_step
            if self._decoder is decoder and n_layers <= self._n_layers:
                pairs = zip(self._text[:-1], prompt[:-1], strict=False)
                shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._owner, self._in_step = answer, True
            self._forget()
            room = min(capacity + _ROOM, max(capacity, decoder.architecture.max_context))
            room = room if same_rope_scaling(decoder, capacity, room) else capacity
            if not shared or not (before and same_rope_scaling(decoder, before.capacity, room)):
                before = None  # its memory can be reused
            elif before.capacity >= capacity and not is_written:
                before.lengths.fill_(shared)
                return before
        # Without the lock, since allocation may wait for other threads.
        cache = decoder.new_cache(room)
        if before is not None:
            cache.take(before, shared)  # an unfinished step writes behind these positions
        return cache

    def keep(
        self, decoder: Decoder, cache: KVCache, text: list[int], n_layers: int, answer: object
    ) -> None:
        """Keep an answer's cache and text (prompt and answer, whose last token no layer has seen).

        The list may grow with the answer, which calls `resume` before it writes to the cache again.

        Raises:
            ValueError: another answer has taken the cache.
        """
        with self._lock:
            self._check(answer)
            self._decoder, self._cache, self._text, self._n_layers = decoder, cache, text, n_layers
            self._in_step = False

    def resume(self, answer: object) -> None:
        """Let an answer write to its cache again.

        Raises:
            ValueError: another answer has taken the cache.
        """
        with self._lock:
            self._check(answer)
            self._in_step = True

    def leave(self, answer: object, *, keeps: bool) -> None:
        """End an answer, and keep its committed positions or nothing."""
        with self._lock:
            if self._owner is answer:
                self._in_step = False
                if not keeps:
                    self._forget()

    def _check(self, answer: object) -> None:
        if self._owner is not answer:
            raise ValueError("another answer has begun with the same prefix: finish one at a time")

    def _forget(self) -> None:
        self._decoder = self._cache = None
        self._text = []


class Prefix:
    """A text whose keys and values a cache has.

    Args:
        tokens: of the text.
        cache: of one row.
        n_layers: number of layers that have run.

    Attributes:
        capacity: positions that the cache was made for, by which LongRoPE chooses its factors.
    """

    def __init__(self, tokens: Sequence[int], cache: KVCache, n_layers: int) -> None:
        self.tokens = np.array(tokens, np.int64)
        self.cache, self.n_layers, self.capacity = cache, n_layers, cache.capacity

    def shared(self, tokens: npt.NDArray[np.int64], beyond: int = 0) -> int:
        """Return how many tokens both texts begin with; 0 if they are not more than `beyond`."""
        n = min(len(self.tokens), len(tokens))
        if n <= beyond or self.tokens[beyond] != tokens[beyond]:  # as of most texts
            return 0
        differs = self.tokens[:n] != tokens[:n]
        return int(differs.argmax()) if differs.any() else n

    def shrink(self, decoder: Decoder) -> None:
        """Move to a cache of no more memory than the text needs."""
        n = len(self.tokens)
        if n < self.cache.capacity:
            smaller = decoder.new_cache(n)
            smaller.take(self.cache, n)
            self.cache = smaller


class PrefixPool:
    """Texts of ended answers whose KV caches later prompts copy from, the least recently used first."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._prefixes: list[Prefix] = []

    @property
    def positions(self) -> int:
        """Positions of all caches."""
        return sum(prefix.cache.capacity for prefix in self._prefixes)

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix; it replaces those that it begins with."""
        if len(prefix.tokens):
            prefix.shrink(self._decoder)
            prefixes = [old for old in self._prefixes if not self._replaces(prefix, old)]
            self._prefixes = [*prefixes, prefix]

    def _replaces(self, new: Prefix, old: Prefix) -> bool:
        length = len(old.tokens)
        is_beginning = old.shared(new.tokens, length - 1) == length and old.n_layers <= new.n_layers
        return is_beginning and same_rope_scaling(self._decoder, new.capacity, old.capacity)

    def take(
        self, prompt: Sequence[int], cache: KVCache, n_layers: int, others: Sequence[Prefix] = ()
    ) -> int:
        """Copy what an empty cache's prompt shares with a text, except the prompt's last token.

        Args:
            prompt: token ids.
            cache: of the prompt, whose length is set.
            n_layers: number of layers that will run.
            others: further texts, such as those of running answers.

        Returns:
            The number of tokens copied.
        """
        text = np.array(prompt[:-1], np.int64)
        best, length = None, 0
        for prefix in (*self._prefixes, *others):
            longer = prefix.shared(text, length) if prefix.n_layers >= n_layers else 0
            if longer and same_rope_scaling(self._decoder, cache.capacity, prefix.capacity):
                best, length = prefix, longer
        if best is None:
            return 0
        cache.take(best.cache, length)
        if best in self._prefixes:
            self._prefixes.remove(best)
            self._prefixes.append(best)
        return length

    def shrink(self, positions: int) -> None:
        """Forget the texts that were not used for longest, until the caches have so many positions."""
        while self._prefixes and self.positions > positions:
            del self._prefixes[0]


def same_rope_scaling(decoder: Decoder, *capacities: int) -> bool:
    """Return whether LongRoPE, which has factors for two lengths, uses the same in all capacities."""
    return all(rope is None or rope.alike(capacities) for rope in set(decoder.architecture.ropes))
