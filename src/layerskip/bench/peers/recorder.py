"""Counts and times a peer's tokens, and ends its answers by this package's rules."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from layerskip.bench.measure import Run
from layerskip.decoding import Step
from layerskip.decoding.stream import TextStream, stop_tokens


class Recorder:
    """Takes tokens as they arrive, as `decoding.Answer` does for this package's own.

    Attributes:
        ended: whether an end token, a stop string, or the last token allowed has come.
    """

    def __init__(
        self,
        now: Callable[[], float],
        tokenizer: Any = None,
        *,
        stop: Sequence[str] = (),
        end_tokens: Collection[int] = (),
        max_new_tokens: int,
    ) -> None:
        self.ended = False
        self._now, self._left = now, max_new_tokens
        self._text = None if tokenizer is None else TextStream(tokenizer, stop)
        named = frozenset[int]() if tokenizer is None else stop_tokens(tokenizer, stop)
        self._end_tokens = named.union(end_tokens)
        self._steps: list[list[int]] = []
        self._times: list[float] = []
        self._started = now()

    def add(self, tokens: Sequence[int], *, new_step: bool = True) -> bool:
        """Take the tokens of one pass, or more tokens of the last one; what follows the end is dropped.

        Returns:
            Whether the answer has ended.
        """
        if self.ended:
            return True
        if new_step or not self._steps:
            self._steps.append([])
        self._times.append(self._now())
        for token in tokens:
            self._steps[-1].append(token)
            self._left -= 1
            if self._text is not None and self._text.may_stop:
                self._text.push(token)
            stopped = self._text is not None and self._text.stopped
            if stopped or token in self._end_tokens or not self._left:
                self.ended = True
                break
        return self.ended

    def run(self, *, peak_memory_bytes: int | None, bytes_of_a_pass: int | None) -> Run:
        """The finished answer; `bytes_of_a_pass` counts the weights that a step reads."""
        if self._text is not None:
            if not self._text.may_stop:  # then text is made when the clock has stopped, as ours is
                self._text.push(*(token for step in self._steps for token in step))
            self._text.finish()
        return Run(
            steps=tuple(Step(tuple(step)) for step in self._steps),
            text="" if self._text is None else self._text.text,
            ttft_s=self._times[0] - self._started,
            decode_s=self._times[-1] - self._times[0],
            weight_bytes_read=bytes_of_a_pass and bytes_of_a_pass * (len(self._steps) - 1),
            peak_memory_bytes=peak_memory_bytes,
        )
