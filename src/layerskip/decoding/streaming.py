"""Steps of the decoding loop to text: `TextStream`, `Answer` and the finished `Generation`."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal

from layerskip.decoding.config import DecodingConfig
from layerskip.decoding.generate import Step

FinishReason = Literal["stop", "length", "interrupted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished answer, or one as far as it has come.

    Attributes:
        text: the new text, without special tokens and without the stop string; empty where the
            checkpoint has no tokenizer.
        token_ids: the new tokens, up to and with the end token.
        finish_reason: "stop" at an end token or stop string, "length" at max_new_tokens or at the end
            of the context, "interrupted" where it is not all of the answer.
        mode: "plain", "early-exit", "self-speculative", or "n-gram" where no layer drafts.
        rounds: draft-and-verify rounds; 0 where nothing can be drafted.
        acceptance_rate: accepted / drafted; None where nothing was drafted.
        mean_accepted_length: tokens a round, the model's own included; None without rounds.
        accepted_by_position: for each draft position, the share of drafts there that were accepted.
        ttft_s: seconds to the first token, prompt included.
        decode_s: seconds from the first token to the last.
        tokens_per_s: new tokens after the first / decode_s; None for a single token.
        steps: the passes that made the answer, in order.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    mode: str
    exit_layer: int | None
    draft_tokens: int | None
    ttft_s: float
    decode_s: float
    steps: tuple[Step, ...] = dataclasses.field(repr=False)

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.token_ids)

    @property
    def rounds(self) -> int:
        """Number of draft-and-verify rounds, without the prompt's own pass."""
        drafts = self.mode not in ("plain", "early-exit")
        return len(self.steps[1:]) if drafts else 0

    @property
    def drafted(self) -> int:
        """Number of drafted tokens, without those behind an end in an accepted draft."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that the model agreed with."""
        return sum(step.accepted for step in self.steps)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a round: accepted ones and the model's own (none where an accepted one is the last)."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else None

    @property
    def accepted_by_position(self) -> list[float]:
        """Share of drafts that were accepted, by their position in the round."""
        return accepted_by_position(self.steps)

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of decoding, the prompt left out."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `generate --json`, in its order."""
        names = (
            "text token_ids finish_reason prompt_tokens new_tokens mode exit_layer draft_tokens"
            " rounds drafted accepted acceptance_rate mean_accepted_length accepted_by_position"
            " ttft_s decode_s tokens_per_s"
        )
        return {name: getattr(self, name) for name in names.split()}


def accepted_by_position(steps: Sequence[Step]) -> list[float]:
    """For draft position i: rounds that accepted more than i tokens / rounds that drafted so many."""
    longest = max((step.drafted for step in steps), default=0)
    rates = []
    for i in range(longest):
        reached = [step for step in steps if step.drafted > i]
        rates.append(sum(step.accepted > i for step in reached) / len(reached))
    return rates


CONTEXT = 8  # earlier tokens that are decoded again with a new one, sometimes one or two more


def stop_tokens(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """Return the tokens that are a stop string by themselves: special ones appear in no text."""
    try:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in stop]
    except (TypeError, UnicodeError) as error:  # such as half of an emoji
        raise ValueError(f"a stop string cannot be made tokens of: {error}") from error
    alone = ((ids[0], text) for ids, text in zip(encoded, stop, strict=True) if len(ids) == 1)
    return frozenset(token for token, text in alone if text in tokenizer.decode([token]))


class TextStream:
    """Turns tokens into text piece by piece; the pieces joined are the whole text.

    A piece is held back while its last character is incomplete (a token may end inside a character)
    and while it may be the beginning of a stop string.

    Args:
        tokenizer: of transformers.
        stop: texts that end the text.
        before: tokens that the text continues: SentencePiece leaves a space out that stands first.

    Attributes:
        text: all that was released so far.
        stopped: whether a stop string has been met; the text ends before it.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        texts = stop if isinstance(stop, Collection) else [stop]
        if any(not isinstance(text, str) or not text for text in texts):
            raise ValueError("a stop string has to be a text that is not empty")
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here: a few tokens of context settle spaces
        self._decoded = 0  # tokens before this one are in the text already
        self._before = ""  # what those from the context on are
        self._held = ""
        context = list(before[-CONTEXT:])
        text = self._decode(context)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # it may end inside a character, too
            self._tokens, self._decoded, self._before = context, len(context), text

    @property
    def may_stop(self) -> bool:
        """True where there are stop strings to look for."""
        return bool(self._stop)

    def copy(self) -> "TextStream":
        """Return another stream that goes on from here by itself."""
        other = copy.copy(self)
        other._tokens = self._tokens.copy()
        return other

    def push(self, *tokens: int) -> str:
        """Add tokens and return the text that is released, often but not always a piece for each."""
        pending_tokens = [*self._tokens[self._context :], *tokens]
        now, next_context = self._decode(pending_tokens), self._context
        before, piece = now, now[len(self._before) :]
        is_whole = bool(piece) and not now.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole and len(pending_tokens) > CONTEXT:
            next_context = self._decoded
            before = self._decode(pending_tokens[self._decoded - self._context :])
        self._tokens.extend(tokens)  # only now, as decoding may be broken off and tried again
        if not is_whole:
            return ""
        self._context, self._before, self._decoded = next_context, before, len(self._tokens)
        return self._release(piece)

    def finish(self) -> str:
        """Release what is still held back."""
        if self.stopped:
            return ""
        self._before, before = self._decode(self._tokens[self._context :]), self._before
        rest = self._before[len(before) :]
        self._decoded = len(self._tokens)
        piece = self._release(rest)
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, piece: str) -> str:
        pending = self._held + piece
        stop_positions = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if stop_positions:
            self.stopped = True
            released, self._held = pending[: min(stop_positions)], ""
        else:
            keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
            released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of the text are a beginning of the stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The text that one token adds to a stream.

    Attributes:
        text: may be empty (see `TextStream`).
        token_id: None for the rest that is released at the end.
        drafted: True for a token that was drafted and accepted, else it is the model's own.
        source: drafter of the token, or "model".
    """

    text: str
    token_id: int | None = None
    drafted: bool = False
    source: str = "model"


class Answer:
    """An answer that is computed while it is iterated over; then ask for its `generation`.

    Args:
        steps: of the decoding loop; not used where a batch computes the answer (see `take`).
        tokenizer: of transformers, or None.
        prompt: token ids.
        config: resolved.
        max_new_tokens: that the config and the context allow.
        eos_token_ids: tokens that end it.
        clock: returns seconds, after waiting for the device.
        continues: whether the text goes on where the prompt's ends.
    """

    def __init__(
        self,
        steps: Generator[Step],
        tokenizer: Any,
        prompt: Sequence[int],
        config: DecodingConfig,
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        clock: Callable[[], float],
        continues: bool = False,
    ) -> None:
        self.config, self.prompt, self.eos_token_ids = config, prompt, eos_token_ids
        self._loop, self._limit, self._clock = steps, max_new_tokens, clock
        self._text: TextStream | None = None
        if tokenizer is not None:
            self._text = TextStream(tokenizer, config.stop, prompt if continues else ())
        self._tokens: list[int] = []
        self._unread: list[int] = []  # tokens that are not in the text yet
        self._steps: list[Step] = []
        self._times: list[float] = []  # when each step arrived
        # The newest step, and how many of its tokens were taken.
        self._step, self._taken = Step((0,)), 1
        self.begin()
        self._arrived = self._started

    def begin(self) -> None:
        """Start the clock, for an answer that has waited for others."""
        self._started, self._paused_s = self._clock(), 0.0

    def close(self) -> None:
        """Compute no more of it and let its cache go: `generation` is what has come.

        Not while another thread is computing it.
        """
        self._loop.close()

    @property
    def stopped(self) -> bool:
        """True once a stop string has ended the text."""
        return self._text is not None and self._text.stopped

    def __iter__(self) -> Iterator[Piece]:
        while self._is_in_step or self._advance():
            yield self._take_token()
        if rest := self.finish():
            yield Piece(text=rest)

    def complete(self) -> Generation:
        """Compute what is left of the answer and return it."""
        while self._is_in_step or self._advance():
            self._take_step()
        self.finish()
        return self.generation

    def take(self, step: Step) -> None:
        """Add a step of a batch's loop, as far as a stop string."""
        self._receive(step)
        self._take_step()

    def finish(self) -> str:
        """Return the text that was held back, in case a stop string began there."""
        if self._text is None or self.stopped:
            return ""
        return self._read() + self._text.finish()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock in a context, such as for drawing."""
        since = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - since

    @property
    def _is_in_step(self) -> bool:
        return self._taken < len(self._step.tokens) and not self.stopped

    def _advance(self) -> bool:
        """Compute the next step; return False at the end."""
        if self.stopped:
            self._loop.close()
            return False
        if not self._steps:
            self.begin()
        step = next(self._loop, None)
        if step is not None:
            self._receive(step)
        return step is not None

    def _receive(self, step: Step) -> None:
        self._step, self._taken = step, 0
        self._arrived = self._clock() - self._paused_s

    def _take_token(self) -> Piece:
        """Take the next token of the step, so that an interrupted answer has what was taken of it."""
        step, token = self._step, self._step.tokens[self._taken]
        text = self._read()
        if self._text is not None:
            text += self._text.push(token)
        drafted = self._taken < step.accepted
        source = step.sources[self._taken] if drafted and step.sources else "model"
        self._count(1, [token])
        return Piece(text=text, token_id=token, drafted=drafted, source=source)

    def _take_step(self) -> None:
        """Take all tokens of the step; their text is made when it is needed, unless it may stop."""
        if self._text is not None and self._text.may_stop:
            while self._is_in_step:
                self._take_token()
            return
        tokens = self._step.tokens[self._taken :]
        self._unread += tokens
        self._count(len(tokens), tokens)

    def _count(self, n: int, tokens: Sequence[int]) -> None:
        if not self._taken:
            self._times.append(self._arrived)
            self._steps.append(self._step)
        self._taken += n
        self._tokens += tokens
        self._steps[-1] = self._step.first(self._taken)

    def _read(self) -> str:
        """Make the text of the tokens that are not in it yet."""
        text = ""
        while self._text is not None and self._unread:
            text += self._text.push(self._unread[0])
            del self._unread[0]
        return text

    @property
    def generation(self) -> Generation:
        """The answer as far as it has come."""
        self._read()
        ended = bool(self._tokens) and self._tokens[-1] in self.eos_token_ids
        is_whole = len(self._tokens) == self._limit
        reason: FinishReason = (
            "stop" if self.stopped or ended else "length" if is_whole else "interrupted"
        )
        text = self._text
        if text is not None and (ended or is_whole) and not self.stopped:  # nothing more can come
            text = text.copy()
            text.finish()
        first, last = (self._times[0], self._times[-1]) if self._times else (self._started,) * 2
        return Generation(
            text=text.text if text else "",
            token_ids=list(self._tokens),
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            mode=self.config.reported_mode,
            exit_layer=self.config.exit_layer,
            draft_tokens=self.config.draft_tokens,
            ttft_s=first - self._started,
            decode_s=last - first,
            steps=tuple(self._steps),
        )
