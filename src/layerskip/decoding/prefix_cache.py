"""`PrefixCache`: keys and values that a prompt shares with the text before it are computed once."""

import threading
from collections.abc import Sequence
from itertools import takewhile

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


def same_rope_scaling(decoder: Decoder, *capacities: int) -> bool:
    """Return whether LongRoPE, which has factors for two lengths, uses the same in all capacities."""
    return all(rope is None or rope.alike(capacities) for rope in set(decoder.architecture.ropes))
