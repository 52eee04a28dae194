"""Files of prompts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerskip.bench.prompts import NEEDED, prompt_of


def read_prompts(file: Path) -> list[Any]:
    """The prompts of a file, each a text, a list of token ids or a conversation, at least one.

    Args:
        file: .jsonl with a field "prompt" or "messages" in each line (a conversation that ends with an
            answer is asked without it), else one prompt a line.

    Raises:
        ValueError: the file cannot be read, a line is no prompt, or there is none.
    """
    prompts = list(_prompts(file))
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def read_stdin() -> str:
    """Standard input as one prompt, less a byte order mark and one line break at its end.

    Raises:
        ValueError: it is no text.
    """
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is no text in {error.encoding} ({error.reason})"
        ) from error


def _prompts(file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".json":
        raise ValueError(
            f"{file} may be one JSON document: name it .jsonl, with a prompt in each line"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # alone: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix.lower() != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
        except RecursionError:
            raise ValueError(f"{file}, line {number}: nested too deeply") from None
        fields = row if isinstance(row, dict) else {}
        prompt: Any = prompt_of(fields)[0] or fields.get("prompt")
        if not isinstance(prompt, str | list | dict) or not prompt:
            raise ValueError(f"{file}, line {number}: {NEEDED} is needed")
        yield prompt
