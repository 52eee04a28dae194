"""What a prompt shares with the text before it, as every turn of a conversation does: computed once."""

import threading
from collections.abc import Sequence
from itertools import takewhile

from layerskip.model import Decoder, KVCache

_ROOM = 1024  # positions more than are asked for: what follows most often fits into the same cache


class PrefixCache:
    """The cache of the last answer, for the next prompt as far as both texts begin alike.

    Given to one answer after another (`LayerSkipModel.answer(prompt, prefix=prefix)`), it changes none
    of them beyond rounding: keys and values do not depend on what comes later. One answer at a time: the
    next one takes the cache, and what was unfinished cannot go on, whichever threads they are in. It
    holds the memory of one cache, of two while a longer text moves to a larger one.
    """

    def __init__(self) -> None:
        self._decoder: Decoder | None = None
        self._cache: KVCache | None = None
        self._text: list[int] = []  # the cache holds keys and values of all but the last token
        self._n_layers = 0  # in so many layers
        self._taken_by: object = None
        self._in_step = False  # who took the cache is writing to it just now
        self._lock = threading.RLock()  # inside it the garbage collector may end an answer

    def cache_for(
        self, decoder: Decoder, prompt: Sequence[int], capacity: int, n_layers: int, answer: object
    ) -> KVCache:
        """A cache for an answer; its length says how many tokens of the prompt it holds already.

        At least the last one is left, after which the answer begins.

        Args:
            decoder: that will run.
            prompt: its token ids.
            capacity: positions of prompt and answer.
            n_layers: layers that will run over the prompt.
            answer: which takes the cache, for `keep`.
        """
        with self._lock:
            before, shared, is_written = self._cache, 0, self._in_step
            if self._decoder is decoder and n_layers <= self._n_layers:
                pairs = zip(self._text[:-1], prompt[:-1], strict=False)
                shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._taken_by, self._in_step = answer, True
            self._forget()
            room = min(capacity + _ROOM, max(capacity, decoder.architecture.max_context))
            room = room if same_rope_scaling(decoder, capacity, room) else capacity
            if not shared or not (before and same_rope_scaling(decoder, before.capacity, room)):
                before = None  # its memory may be that of the next
            elif before.capacity >= capacity and not is_written:
                before.lengths.fill_(shared)
                return before
        # Without the lock, since a decoder may wait for others before it makes one.
        cache = decoder.new_cache(room)
        if before is not None:
            cache.take(before, shared)  # a step writes behind what is settled
        return cache

    def keep(
        self, decoder: Decoder, cache: KVCache, text: list[int], n_layers: int, answer: object
    ) -> None:
        """Remember an answer's cache and text: prompt and answer, whose last token no layer has seen.

        The list may grow with the answer, which calls `resume` before it writes to the cache again.

        Raises:
            ValueError: another answer has taken the cache.
        """
        with self._lock:
            self._check(answer)
            self._decoder, self._cache, self._text, self._n_layers = decoder, cache, text, n_layers
            self._in_step = False

    def resume(self, answer: object) -> None:
        """Let an answer write to its cache; ValueError where another answer has taken it."""
        with self._lock:
            self._check(answer)
            self._in_step = True

    def leave(self, answer: object, *, keeps: bool) -> None:
        """The end of an answer, which keeps what was settled or nothing.

        What another has taken since stays.
        """
        with self._lock:
            if self._taken_by is answer:
                self._in_step = False
                if not keeps:
                    self._forget()

    def _check(self, answer: object) -> None:
        if self._taken_by is not answer:
            raise ValueError("another answer has begun with the same prefix: finish one at a time")

    def _forget(self) -> None:
        self._decoder = self._cache = None
        self._text = []


def same_rope_scaling(decoder: Decoder, *capacities: int) -> bool:
    """Whether keys are turned alike in caches of these capacities: LongRoPE has factors for two."""
    return all(rope is None or rope.alike(capacities) for rope in set(decoder.architecture.ropes))
