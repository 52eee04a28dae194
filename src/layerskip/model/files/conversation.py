"""What a conversation gives its chat template beside the messages: the same in training and decoding."""

import json
from collections.abc import Mapping
from typing import Any

# Of `apply_chat_template` itself: they decide what is written and returned, not what the template sees.
_NO_VARIABLES = frozenset(
    [
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    ]
)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """The `tools` and `chat_template_kwargs` of a row, as `apply_chat_template` takes them.

    Args:
        row: both may be missing, or JSON, as tables have them.

    Raises:
        ValueError: one of them is of another kind, or a name is none of a variable.
    """
    tools, variables = (_read(row, name) for name in ("tools", "chat_template_kwargs"))
    if tools is not None and not (
        isinstance(tools, list)
        and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError("tools is to be a list of descriptions")
    if variables is not None and not isinstance(variables, Mapping):
        raise ValueError("chat_template_kwargs is to have names and values")
    if taken := _NO_VARIABLES & set(variables or ()):
        raise ValueError(f"chat_template_kwargs names {min(taken)}, no variable of a template")
    return {**(variables or {}), "tools": tools or None}


def _read(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error.msg}") from None
