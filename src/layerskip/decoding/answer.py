"""An answer while it is made: steps in, pieces of text and the finished `Generation` out."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from layerskip.decoding.generate import generate
from layerskip.decoding.generation import FinishReason, Generation
from layerskip.decoding.policy import Plan
from layerskip.decoding.prefix import Prefix
from layerskip.decoding.sampling import Sampling
from layerskip.decoding.step import Ending, Step
from layerskip.decoding.stream import TextStream, stop_tokens
from layerskip.model.step_timing import device_clock

if TYPE_CHECKING:
    from layerskip.decoding.language_model import LayerSkipModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one token adds while an answer streams.

    `text` may be empty (see `TextStream`); `token_id` is None for the rest that is released at the
    end; `drafted` says that the token was drafted and accepted, else it is the model's own.
    """

    text: str
    token_id: int | None = None
    drafted: bool = False


class Answer:
    """An answer in the making: iterate over its pieces, then ask for its `generation`."""

    def __init__(
        self,
        model: "LayerSkipModel",
        prompt: Sequence[int],
        plan: Plan,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        ignore_eos: bool,
        seed: int | None,
        continues: bool,
        prefix: Prefix | None = None,
    ) -> None:
        self.plan, self.sampling, self.prompt = plan, sampling, prompt
        self._clock = device_clock(model.decoder.device)
        self._end_tokens = frozenset(() if ignore_eos else model.end_tokens)
        self._text = None
        if model.tokenizer is not None:
            self._text = TextStream(model.tokenizer, stop, prompt if continues else ())
            self._end_tokens |= stop_tokens(model.tokenizer, stop)
        elif stop:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
        self._unread = deque[int]()  # tokens whose text nobody has needed yet
        self._limit = Ending.of(model.decoder, prompt, max_new_tokens).limit
        self.begin()
        self._arrived = self._started  # when the last step came
        self._times: list[float] = []
        self._tokens: list[int] = []
        self._steps: list[Step] = []
        # The last step, and how many of its tokens were taken, while that is not all of them.
        self._broken_off: tuple[Step, int] | None = None
        # What `generate` and `Batch` are given beside the prompt.
        self.loop_options: dict[str, Any] = {
            "plan": plan,
            "sampling": sampling,
            "max_new_tokens": max_new_tokens,
            "end_tokens": self._end_tokens,
            "seed": seed,
        }
        self._loop = generate(model.decoder, prompt, prefix=prefix, **self.loop_options)

    def begin(self) -> None:
        """Start its clock, as where it has waited for its turn."""
        self._started, self._paused_s = self._clock(), 0.0

    def close(self) -> None:
        """Compute no more of it and let its cache go: `generation` is what has come.

        Not while another thread is computing it.
        """
        self._loop.close()

    def __iter__(self) -> Iterator[Piece]:
        yield from self._rest_of_a_step()
        for step in self._steps_left():
            self._arrive(step)
            yield from self._pieces(step)
        if rest := self.finish():
            yield Piece(text=rest)

    def _steps_left(self) -> Iterator[Step]:
        """The loop's steps, until whoever takes them has met a stop string."""
        if not self._steps:
            self.begin()
        while not self.stopped:
            step = next(self._loop, None)
            if step is None:
                return
            yield step
        self._loop.close()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._text is not None and self._text.stopped

    def take(self, step: Step) -> None:
        """Add a step, as far as a stop string; for who runs the loop, as a batch does.

        No text is made that is not needed yet: a token's takes as long as drafting it may.
        """
        self._arrive(step)
        if self._text is not None and self._text.may_stop:
            text = self._text.copy()
            text.push(*step.tokens)
            if text.stopped or text.waits:
                for _ in self._pieces(step):  # it may be any token that ends the text
                    pass
                return
            self._text = text
        else:
            self._unread += step.tokens
        self._note(step)
        self._tokens += step.tokens
        self._broken_off = None

    def _arrive(self, step: Step) -> None:
        """None of its tokens is taken yet; whatever breaks off before one is leaves it to come."""
        self._arrived = self._clock() - self._paused_s
        self._broken_off = step, 0

    def _note(self, step: Step) -> None:
        self._times.append(self._arrived)
        self._steps.append(step)

    def _pieces(self, step: Step, taken: int = 0) -> Iterator[Piece]:
        """Token by token, so that an answer that is given up has what was taken of it and no more."""
        text = self._read()
        for token in step.tokens[taken:]:
            text += self._text.push(token) if self._text else ""  # first: it takes the longest
            if not taken:
                self._note(step)
            taken += 1
            self._tokens.append(token)
            self._steps[-1] = step.first(taken)
            self._broken_off = None if self.stopped else (step, taken)
            yield Piece(text=text, token_id=token, drafted=taken <= step.accepted)
            if self.stopped:
                return
            text = ""
        self._broken_off = None

    def _rest_of_a_step(self) -> Iterator[Piece]:
        """Of the last step, where whoever took its tokens went away in the middle."""
        if self._broken_off is not None:
            yield from self._pieces(*self._broken_off)

    def _read(self) -> str:
        """Make the text of the tokens that nobody has needed yet."""
        read = ""
        while self._text is not None and self._unread:
            # One by one: where the answer is given up inside a character, all before it is text.
            read += self._text.push(self._unread[0])
            self._unread.popleft()
        return read

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is the reader's own, such as for drawing: it is not counted."""
        since = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - since

    def finish(self) -> str:
        """The text that was held back, as in case a stop string began there."""
        if self._text is None or self.stopped:
            return ""
        return self._read() + self._text.finish()

    def complete(self) -> Generation:
        """Compute what is left of the answer and return it."""
        for _ in self._rest_of_a_step():
            pass
        for step in self._steps_left():
            self.take(step)
        self.finish()
        return self.generation

    @property
    def generation(self) -> Generation:
        """The answer as far as it has come."""
        self._read()
        ended = bool(self._tokens) and self._tokens[-1] in self._end_tokens
        whole = len(self._tokens) == self._limit
        reason: FinishReason = (
            "stop" if self.stopped or ended else "length" if whole else "interrupted"
        )
        text = self._text
        if text is not None and (ended or whole) and not self.stopped:  # nothing more can come
            text = text.copy()
            text.finish()
        first, last = (self._times[0], self._times[-1]) if self._times else (self._started,) * 2
        return Generation(
            text=text.text if text else "",
            token_ids=list(self._tokens),
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            mode=self.plan.mode,
            exit_layer=self.plan.exit_layer,
            draft_tokens=self.plan.draft_tokens,
            ttft_s=first - self._started,
            decode_s=last - first,
            steps=tuple(self._steps),
        )
