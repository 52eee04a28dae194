"""What a command is asked to write: checked before any long work, and delivered whole."""

import codecs
import contextlib
import errno
import importlib.util
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

from layerskip.fileio import json_text, replace
from layerskip.model import Decoder, native

# All of C0 and C1 but tab, line feed and carriage return: sequences that set titles or the clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escape_control_chars(text: str) -> str:
    """The text with the codes of control characters in their place."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def log_stderr(line: str) -> None:
    """A line of ours on stderr, beside what is asked for."""
    print(f"layerskip: {escape_control_chars(line)}", file=sys.stderr)


class EscapedRecord(logging.LogRecord):
    """A line of a library's log, which may repeat what a checkpoint says."""

    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        """The message."""
        return escape_control_chars(super().getMessage())


def set_threads(asked: int | None = None) -> None:
    """Have PyTorch use so many threads; None: no more than a container's share of the processors.

    PyTorch counts the processors alone. With more threads than its share a container is stopped for the
    rest of each period, and all threads wait for those that are.
    """
    threads = native.num_threads_to_use() if asked is None else asked
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def note_idle_gpu() -> None:
    """A line on stderr where a GPU is here; for commands that nobody told which device to take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: then there is none to name
        is_here = torch.cuda.is_available()
    if is_here:
        log_stderr("a GPU is here: --device cuda uses it")


def note_weights(decoder: Decoder) -> None:
    """A line on stderr where quantized weights save no memory, in two layouts on a GPU, or no time."""
    on_gpu, in_bfloat16 = decoder.device.type == "cuda", decoder.dtype == torch.bfloat16
    if on_gpu and in_bfloat16 and decoder.weights == "int8":
        log_stderr(
            "in bfloat16 on a GPU --weights int8 takes more memory than 16bit; int4 takes less"
        )
    if decoder.weights != "16bit" and decoder.kernels == "pytorch" and not (on_gpu or in_bfloat16):
        log_stderr(f"without the compiled kernels --weights {decoder.weights} is slower than 16bit")


REDRAWN_S = 0.5  # more often would take time from what is being timed

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is, and of how much."""


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """A bar for every stretch of work that is reported."""
    console = Console(file=sys.stderr)  # this very file, whatever stands for stderr meanwhile
    # No thread draws it: it would take time from what is being timed.
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
    known: dict[str, Any] = {}
    drawn = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal drawn
        is_due = what not in known or done == total or time.monotonic() - drawn > REDRAWN_S
        if what not in known:
            known[what] = shown.add_task(escape_control_chars(what))
        shown.update(known[what], completed=done, total=total, refresh=is_due)
        drawn = time.monotonic() if is_due else drawn

    with shown:
        yield report


def track(things: Sequence[Any], what: str) -> Iterable[Any]:
    """The things, with a bar of how many there have been."""
    console = Console(stderr=True)
    return rich_track(things, what, console=console, disable=not sys.stderr.isatty())


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
        if _links_to_itself(output):
            raise click.UsageError(f"{flag} {output} is a link to itself: name another file")
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


def _links_to_itself(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


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
