"""Single tokens as text that can be seen: spaces, line ends, and control characters too."""

import functools
from typing import Any

_VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


class Symbols:
    """What to write for a token; `symbols[id]`."""

    def __init__(self, tokenizer: Any) -> None:
        """A tokenizer as transformers has it, or None: then a token is its number."""
        self._tokenizer = tokenizer
        self._symbol = functools.cache(self._make)

    def __getitem__(self, token_id: int) -> str:
        return self._symbol(token_id)

    def _make(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"#{token_id}"
        # Twice, less once: some tokenizers drop the space before the first token.
        once, twice = (self._decode([token_id] * n) for n in (1, 2))
        return visible(twice[len(once) :]) or f"#{token_id}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """The text with a sign in the place of every character that would not be seen.

    This covers what turns the direction of writing and what terminals obey.
    """
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
