"""What a command is asked to write: checked before any long work, and delivered whole."""

import codecs
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from layerskip.model.files.json_files import json_text
from layerskip.model.files.writing import replace

_OF_A_CHECKPOINT = re.compile(
    r"(\w*config|special_tokens_map|added_tokens|vocab|.*\.index)\.json|tokenizer.*|.*\.(safetensors|gguf)"
)


def deliver(result: Any, *, as_json: bool, output: Path | None) -> None:
    """Print the result as JSON, write it to a file, or both; the file appears whole or not at all.

    What was measured says by which command.
    """
    if isinstance(result, dict) and "environment" in result:
        command = shlex.join(["layerskip", *sys.argv[1:]])
        result = {**result, "environment": {"command": command, **result["environment"]}}
    text = json_text(result)
    try:
        if output is not None:
            # Half an emoji in a path or an answer is no UTF-8, but \udXXX is JSON.
            replace(output, text.encode(errors="backslashreplace"))
    except BrokenPipeError:  # a pipe whose reader has left
        raise
    except OSError as error:
        raise OSError(f"{output} could not be written: {error.strerror or error}") from error
    finally:
        if as_json:
            is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
            sys.stdout.write(text if is_utf8 else json_text(result, ascii_only=True))
            sys.stdout.flush()  # a full disk or a reader that has left is met here, not at the end


def check_outputs(
    outputs: Mapping[str, Path | None], beside: Iterable[str | Path | None] = ()
) -> None:
    """Refuse output files that cannot be written, before any long work starts.

    Args:
        outputs: flag -> its file, each another one.
        beside: what this call reads; files, and those that make a folder a checkpoint, are not to be
            replaced.
    """
    given = [Path(file) for file in beside if file is not None]
    taken = {file.resolve() for file in given if file.is_file()}
    folders = {folder.resolve() for folder in given if folder.is_dir()}
    for flag, output in outputs.items():
        if output is None or (output.exists() and not (output.is_file() or output.is_dir())):
            continue  # a pipe or a device is written to
        place = output.resolve()
        if not place.parent.is_dir():
            raise click.UsageError(f"the folder of {flag} {output} does not exist")
        if not os.access(place.parent, os.W_OK):
            raise click.UsageError(f"the folder of {flag} {output} cannot be written to")
        if place in taken or (place.parent in folders and _OF_A_CHECKPOINT.fullmatch(place.name)):
            raise click.UsageError(
                f"{flag} {output} would replace what this call reads or writes: name another file"
            )
        taken.add(place)


def check_report(folder: Path | None) -> None:
    """The same for a folder of pictures, which is made where it does not exist, and its pictures."""
    if folder is not None:
        check_pictures("--report")
        inside = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        check_outputs({"--report": inside / "report"})


def check_pictures(flag: str) -> None:
    """Refuse to draw where matplotlib is not installed, before any long work starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{flag} needs matplotlib; run: pip install 'layerskip[plot]'")
