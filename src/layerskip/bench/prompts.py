"""What a row of somebody's own file asks, and what it says the answer is."""

from collections.abc import Mapping
from typing import Any

from layerskip.decoding.prompt import CONVERSATION, Prompt, is_message

NEEDED = "`prompt` (a text) or `messages` (role and content)"


def prompt_of(row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    """The prompt, "" where there is none, and the answer that it comes with, if any.

    A conversation that ends with an answer is asked without it.
    """
    messages, answer = row.get("messages") or row.get("prompt"), None
    if messages and isinstance(messages, list) and all(map(is_message, messages)):
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1].get("content")
        more = {name: row[name] for name in CONVERSATION[1:] if row.get(name)}
        return {"messages": messages, **more} if more else messages, answer
    prompt = row.get("prompt")
    return (prompt if isinstance(prompt, str) else ""), None
