"""Prompts: texts, token ids or conversations, and their tokenization."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from layerskip.data.readers import CONVERSATION, is_message
from layerskip.model import Decoder
from layerskip.model.chat_template import render_chat, template_arguments

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]

_EXPECTED = (
    "a prompt is a text, token ids, messages with role and content, or a dict of messages, tools and"
    " chat_template_kwargs"
)


class PromptError(ValueError):
    """A prompt that cannot be continued: empty, too long, or with ids outside the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A tokenized prompt.

    Attributes:
        ids: the tokens.
        continues: whether the answer's text goes on where the prompt's ends.
    """

    ids: list[int]
    continues: bool


@contextlib.contextmanager
def named(number: int) -> Iterator[None]:
    """Prefix the error of one of several prompts with its number, counted from 1."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"prompt {number}: {error}") from error.__cause__


def tokenize(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        prompt: a text, which is tokenized as it stands; token ids; messages (dicts with role and
            content), to which the chat template is applied; or a dict of `messages` and, for templates
            that use them, `tools` and `chat_template_kwargs`.
        tokenizer: of transformers, or None.

    Raises:
        PromptError: it is no prompt, or it needs a tokenizer or chat template that is missing.
    """
    if not isinstance(prompt, Sequence | Mapping) or isinstance(prompt, bytes | bytearray):
        raise PromptError(_EXPECTED)
    ids = [int(part) for part in prompt if isinstance(part, Integral)]
    if len(ids) == len(prompt) and not isinstance(prompt, str | Mapping):
        return ids
    if tokenizer is None:
        raise PromptError("this checkpoint has no tokenizer; give the prompt as token ids")
    if isinstance(prompt, str):
        ids = encode(prompt, tokenizer, add_special_tokens=True)
        begin = tokenizer.bos_token
        if begin and prompt.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
            del ids[0]  # the text begins with it
        return ids
    return encode(_rendered(prompt, tokenizer), tokenizer, add_special_tokens=False)


def encode(text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text, without the tokenizer's warning about its length."""
    try:
        ids: list[int] = tokenizer.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )
    except (TypeError, UnicodeError) as error:  # such as a lone surrogate
        raise PromptError(f"this text cannot be tokenized: {error}") from error
    return ids


def check_prompt(decoder: Decoder, prompt: Sequence[int]) -> None:
    """Raise PromptError where a prompt is empty, too long, or has ids outside the vocabulary."""
    a = decoder.architecture
    if not prompt:
        raise PromptError("the prompt is empty; it needs at least one token")
    if len(prompt) > a.max_context:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens, this model's context holds {a.max_context};"
            " shorten the prompt"
        )
    if min(prompt) < 0 or max(prompt) >= a.vocab_size:
        raise PromptError(
            f"the prompt has a token id outside the vocabulary (0 to {a.vocab_size - 1})"
        )


def with_variables(prompt: Prompt, variables: Mapping[str, Any]) -> Prompt:
    """Add `chat_template_kwargs` to a conversation, whose own win; return other prompts as they are."""
    conversation: Mapping[str, Any] = (
        prompt if isinstance(prompt, Mapping) else {"messages": prompt}
    )
    messages: Any = conversation.get("messages")
    if not isinstance(messages, list | tuple) or not all(map(is_message, messages or [None])):
        return prompt
    kwargs = conversation.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):  # reported where it is used
        return prompt
    return {**conversation, "chat_template_kwargs": {**variables, **kwargs}}


def is_batch(prompt: Any) -> bool:
    """Return whether this is a list, perhaps empty, of prompts (texts, ids, conversations)."""
    if isinstance(prompt, list | tuple) and not prompt:
        return True
    first = next(iter(prompt), None) if isinstance(prompt, list | tuple) else None
    return isinstance(first, str | list | tuple) or (
        isinstance(first, Mapping) and "messages" in first
    )


def _rendered(prompt: Sequence[Any] | Mapping[str, Any], tokenizer: Any) -> str:
    """Apply the chat template to a conversation, up to where the answer begins."""
    conversation: dict[str, Any] = (
        dict(prompt) if isinstance(prompt, Mapping) else {"messages": prompt}
    )
    messages: Any = conversation.get("messages")
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str) and messages
    if not is_list or not all(map(is_message, messages)) or set(conversation) - set(CONVERSATION):
        raise PromptError(_EXPECTED)
    if not tokenizer.chat_template:
        raise PromptError("this checkpoint has no chat template; give the prompt as a text")
    try:
        arguments = template_arguments(conversation)
        return render_chat(tokenizer, messages, add_generation_prompt=True, **arguments)
    except ValueError as error:  # no system message, turns, ...
        raise PromptError(f"the chat template refuses these messages: {error}") from error
