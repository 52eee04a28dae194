"""Tokens to text as they arrive, and the end at a stop string."""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

CONTEXT = 8  # tokens of settled text that are decoded again with a new one, or one or two more


def stop_tokens(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """The tokens that are a stop string by themselves; of special ones no text shows any."""
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

    def copy(self) -> "TextStream":
        """Another that goes on from here by itself."""
        other = copy.copy(self)
        other._tokens = self._tokens.copy()
        return other

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings to look for."""
        return bool(self._stop)

    @property
    def waits(self) -> bool:
        """Whether the newest tokens are not looked at yet: they end inside a character."""
        return self._decoded < len(self._tokens)

    def push(self, *tokens: int) -> str:
        """Add tokens and return the text that is released, often but not always a piece for each."""
        known = [*self._tokens[self._context :], *tokens]
        now, next_context = self._decode(known), self._context
        before, piece = now, now[len(self._before) :]
        is_whole = bool(piece) and not now.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole and len(known) > CONTEXT:
            next_context = self._decoded
            before = self._decode(known[self._decoded - self._context :])
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
        found = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = pending[: min(found)], ""
        else:
            keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
            released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text are a beginning of the stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
