"""What a row of somebody's own file asks, and what it says the answer is."""

from collections.abc import Mapping
from typing import Any

NEEDED = "`prompt` (a text) or `messages` (role and content)"


def prompt_of(row: Mapping[str, Any]) -> tuple[str | list[Mapping[str, Any]], str | None]:
    """The prompt, "" where there is none, and the answer that it comes with, if any.

    A conversation that ends with an answer is asked without it.
    """
    messages = row.get("messages")
    if messages and isinstance(messages, list) and all(map(_is_message, messages)):
        if messages[-1]["role"] == "assistant":
            return messages[:-1], messages[-1]["content"]
        return messages, None
    prompt = row.get("prompt")
    return (prompt if isinstance(prompt, str) else ""), None


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and {"role", "content"} <= one.keys()
