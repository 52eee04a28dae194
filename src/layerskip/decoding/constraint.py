"""Constrained decoding: the tokens that a JSON schema or a regular expression allows next.

The grammar is compiled and followed by llguidance, which also names the tokens that have to follow.
Draft and target are masked alike, so that outputs are distributed as those of masked plain decoding.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Whitespace is as `json.dumps` writes it. A free choice would leave few tokens that have to follow, and
# small models may then write line breaks without end.
_JSON_LAYOUT: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# Steps of work at compilation and for each mask (some 20 ms, and 15 ms), and states of 1 to 2 kB each.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "max_grammar_size": 200_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}


def grammar_tokenizer(tokenizer: Any, vocab_size: int, end_tokens: Collection[int]) -> Any:
    """Return llguidance's form of a tokenizer, which takes about a second to make.

    Args:
        tokenizer: of transformers.
        vocab_size: V of the model, which may exceed the tokenizer's.
        end_tokens: tokens that end an answer.

    Raises:
        ValueError: llguidance is not installed, or cannot use the tokenizer.
    """
    try:
        import llguidance.hf
    except ImportError:
        raise ValueError(
            "a JSON schema or regular expression needs llguidance: pip install 'layerskip[serve]'"
        ) from None
    if tokenizer is None or not end_tokens:
        missing = "tokenizer" if tokenizer is None else "end-of-sequence token"
        raise ValueError(
            f"this checkpoint has no {missing}; a JSON schema or regular expression needs one"
        )
    return llguidance.hf.from_tokenizer(tokenizer, vocab_size, sorted(end_tokens))


class Constraint:
    """The grammar of one answer, and the place in it: a `LogitsMask`.

    The matcher moves on with the answer and is rolled back where drafted tokens were rejected.

    Args:
        tokenizer: see `grammar_tokenizer`.
        json_schema: text of a JSON schema, or None.
        regex: a regular expression that the whole answer matches (Rust's syntax), or None.

    Raises:
        ValueError: the schema or regular expression is invalid, not supported, or too complex.
    """

    def __init__(
        self, tokenizer: Any, *, json_schema: str | None = None, regex: str | None = None
    ) -> None:
        from llguidance import LLMatcher, LLParserLimits

        if json_schema is not None:
            name = "JSON schema"
            grammar = LLMatcher.grammar_from_json_schema(json_schema, overrides=_JSON_LAYOUT)
        else:
            name = "regular expression"
            grammar = LLMatcher.grammar_from_regex(regex or "")
        self._end_token: int = tokenizer.eos_token
        self._matcher: Any = LLMatcher(
            tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS)
        )
        self._tokens: list[int] = []  # those that the matcher has consumed
        self._matcher.compute_logit_bias()  # finds out whether any text is allowed
        self._check(f"the {name} cannot be used")

    def __call__(self, tokens: Sequence[int]) -> Tensor | None:
        """Return the tokens that may follow, [V] bool; None after tokens that were not allowed.

        An end token is among them where the grammar may end.

        Raises:
            ValueError: no token of the model may follow, or the grammar is too complex.
        """
        if not self._follow(tokens):
            return None
        mask = torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0)
        self._check("the grammar cannot be followed")
        return mask

    def forced_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that have to follow, as far as there is one continuation.

        An end token is the last where the grammar has to end.
        """
        if not self._follow(tokens):
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()
        if self._follow([*tokens, *forced]) and self._matcher.is_stopped():
            forced.append(self._end_token)
        return forced

    def _follow(self, tokens: Sequence[int]) -> bool:
        """Move the matcher behind some tokens; return whether all of them are allowed."""
        new, shared = list(tokens), min(len(tokens), len(self._tokens))
        while new[:shared] != self._tokens[:shared]:
            shared -= 1
        if shared < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - shared)
            del self._tokens[shared:]
        consumed = self._matcher.try_consume_tokens(new[shared:])
        self._tokens += new[shared : shared + consumed]
        return len(self._tokens) == len(new)

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            error: str = self._matcher.get_error()
            reason = "no text is allowed" if "NoExtension" in error else _one_line(error)
            raise ValueError(f"{what}: {reason}")


def schema_text(schema: Any) -> str:
    """Return a JSON schema as text.

    Args:
        schema: a text, or an object as the json module has it.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the JSON schema is not JSON: {_one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError("a JSON schema has to be an object")
    return text


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
