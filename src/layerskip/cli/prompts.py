"""Prompts from the command line, from a file, and from standard input."""

import sys
from pathlib import Path
from typing import Any

import click

from layerskip.data.readers import read_prompts


def asked_prompts(prompt: str | None, file: Path | None, flag: str, *, chat: bool) -> list[Any]:
    """What a command is asked, each a text, a list of token ids or a conversation, at least one.

    Args:
        prompt: of --prompt. Without it and without a file, standard input is one prompt, less a byte
            order mark and one line break at its end.
        file: compressed (.gz, .xz) or not; .jsonl with a field "prompt" or "messages" in each line (a
            conversation that ends with an answer is asked without it), else one prompt a line.
        flag: that names such a file.
        chat: whether texts are asked in a conversation.

    Raises:
        click.UsageError: there is no prompt, and nobody should wait for one at a terminal.
        ValueError: file or standard input cannot be read, a line is no prompt, or there is none.
    """
    if file is not None:
        prompts = read_prompts(file)
    elif prompt is not None:
        prompts = [prompt]
    elif sys.stdin.isatty():
        raise click.UsageError(f"give a prompt with --prompt or {flag}, or on standard input")
    else:
        prompts = [_standard_input()]
    if not chat:
        return prompts
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def _standard_input() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is no text in {error.encoding} ({error.reason})"
        ) from error
