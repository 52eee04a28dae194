"""Terminal and files: lines, progress bars, answers, and results that are written whole."""

import codecs
import contextlib
import errno
import importlib.util
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

from layerskip.fileio import check_within, json_text, replace

if TYPE_CHECKING:  # PyTorch takes seconds, and this module is imported first
    from layerskip.decoding import Generation, Piece

# C0 and C1 without tab and line feed: sequences that set titles or the clipboard, and the carriage
# return, with which text overwrites its own line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CHECKPOINT_FILE = re.compile(
    r"(\w*config|special_tokens_map|added_tokens|vocab|.*\.index)\.json|tokenizer.*|.*\.(safetensors|gguf)"
)
DRAFTED_COLOUR = "green"
REDRAW_S = 0.5  # more often would take time from what is being measured

Report = Callable[[str, int, int], None]
"""Called with a description of the work, how much of it is done, and the total."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: keeps what Ctrl-C keeps."""


def escape_control_chars(text: str) -> str:
    """Return text with control characters as \\x escapes."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def bash_quoted(text: str) -> str:
    """Return text for a shell that knows $'...', as bash and zsh do."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escape_control_chars(escaped)}'"


def shown(text: str) -> str:
    """Return a name that is safe in rich's markup and on a terminal, in one line."""
    return escape(escape_control_chars(text).replace("\n", "\\n"))


def log_stderr(line: str) -> None:
    """Print a line of ours to stderr."""
    line = escape_control_chars(line).replace("\n", "\\n")
    print(f"layerskip: {line}", file=sys.stderr)


def log_work(what: str) -> None:
    """Print a line to stderr about something that takes long."""
    click.echo(f"{escape_control_chars(what)} ...", err=True)


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print Python warnings in one line, without the place in the code; skip those for developers."""
    developers = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, developers):
            log_stderr(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def waiting(what: str, is_shown: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context with a spinner on stderr, where that is a terminal."""
    if not (is_shown and sys.stderr.isatty()):  # rich also takes $FORCE_COLOR for a terminal
        return contextlib.nullcontext()
    return Console(stderr=True).status(shown(what))


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """Show a progress bar for every piece of work that is reported."""
    console = Console(file=sys.stderr)  # this file, also where stderr is redirected later
    # Without a refresh thread, which would take time from what is being measured.
    progress = Progress(
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
    tasks: dict[str, Any] = {}
    drawn_at = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal drawn_at
        is_new = what not in tasks
        if is_new:
            tasks[what] = progress.add_task(escape_control_chars(what))
        is_due = is_new or done == total or time.monotonic() - drawn_at > REDRAW_S
        progress.update(tasks[what], completed=done, total=total, refresh=is_due)
        drawn_at = time.monotonic() if is_due else drawn_at

    with progress:
        yield report


def track(things: Sequence[Any], what: str) -> Iterable[Any]:
    """Yield things, with a progress bar on stderr."""
    console = Console(stderr=True)
    return rich_track(things, shown(what), console=console, disable=not sys.stderr.isatty())


def show_pieces(pieces: "Iterable[Piece]", *, show_draft: bool, as_ids: bool = False) -> None:
    """Write an answer to stdout as it arrives.

    Args:
        pieces: of the answer.
        show_draft: mark drafted tokens.
        as_ids: write token ids, where there is no tokenizer and so no text.
    """
    coloured = show_draft and has_colours(Console())
    is_terminal = sys.stdout.isatty()
    for piece in pieces:
        text = f"{piece.token_id} " if as_ids and piece.token_id is not None else piece.text
        text = escape_control_chars(text) if is_terminal else text
        marked = show_draft and piece.drafted and text
        sys.stdout.write(_marked(text, coloured) if marked else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def show_legend() -> None:
    """Explain the marks of `show_pieces` on stderr."""
    click.echo(
        f"{_marked('drafted and accepted', has_colours(Console()))} · the model's own", err=True
    )


def has_colours(console: Console) -> bool:
    """Return True where a console shows colours and NO_COLOR is not set."""
    return console.color_system is not None and not console.no_color and not console.legacy_windows


def _marked(text: str, coloured: bool) -> str:
    return click.style(text, fg=DRAFTED_COLOUR) if coloured else f"[{text}]"


def show_stats(generation: "Generation") -> None:
    """Print one line to stderr: speed, and acceptance where there were rounds."""
    g = generation
    parts = [g.mode, f"{g.prompt_tokens} + {g.new_tokens} tokens"]
    values = {"E": g.exit_layer, "d": g.draft_tokens}
    settings = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    if settings:
        parts[0] += f" ({settings})"
    parts.append(f"first token {g.ttft_s * 1e3:.0f} ms")
    if g.tokens_per_s is not None:
        parts.append(f"{g.tokens_per_s:.1f} tokens/s")
    if g.acceptance_rate is not None and g.mean_accepted_length is not None:
        parts.append(f"acceptance {g.acceptance_rate:.0%}")
        parts.append(f"{g.mean_accepted_length:.2f} tokens a round")
    print(" · ".join(parts), file=sys.stderr)


def deliver(result: Any, *, as_json: bool, output: Path | None) -> None:
    """Print the result as JSON, write it to a file, or both; the file appears whole or not at all.

    A measurement gets the command that made it.
    """
    if isinstance(result, dict) and "environment" in result:
        command = shlex.join(["layerskip", *sys.argv[1:]])
        result = {**result, "environment": {"command": command, **result["environment"]}}
    text = json_text(result)
    try:
        if output is not None:
            # A lone surrogate in a path or an answer is no UTF-8, but \udXXX is JSON.
            replace(output, text.encode(errors="backslashreplace"))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{output} could not be written: {error.strerror or error}") from error
    finally:
        if as_json:
            is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
            sys.stdout.write(text if is_utf8 else json_text(result, ascii_only=True))
            sys.stdout.flush()  # a full disk or a closed pipe is met here, not at exit


def run_all(*actions: Callable[[], Any]) -> None:
    """Run actions in order, each even where one before it has failed; then raise the error."""
    with contextlib.ExitStack() as stack:
        for action in reversed(actions):
            stack.callback(action)


def check_outputs(
    outputs: Mapping[str, Path | None], beside: Iterable[str | Path | None] = ()
) -> None:
    """Refuse output files that cannot be written, before any long work starts.

    Args:
        outputs: flag -> its file; no two may be the same.
        beside: files and checkpoints that this call reads, which may not be replaced.
    """
    inputs = [Path(file) for file in beside if file is not None]
    input_files = {file.resolve() for file in inputs if file.is_file()}
    checkpoints = {folder.resolve() for folder in inputs if folder.is_dir()}
    for flag, output in outputs.items():
        if output is None or (output.exists() and not (output.is_file() or output.is_dir())):
            continue  # a pipe or a device is written to
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                output.stat()
        except OSError as error:
            reason = "a link to itself" if error.errno == errno.ELOOP else error.strerror
            raise click.UsageError(f"{flag} {output} cannot be written: {reason}") from None
        path = output.resolve()
        if not path.parent.is_dir():
            raise click.UsageError(f"the folder of {flag} {output} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise click.UsageError(f"the folder of {flag} {output} cannot be written to")
        in_checkpoint = path.parent in checkpoints and _CHECKPOINT_FILE.fullmatch(path.name)
        if path in input_files or in_checkpoint:
            raise click.UsageError(
                f"{flag} {output} would replace what this call reads or writes: name another file"
            )
        input_files.add(path)


def check_report(folder: Path | None) -> None:
    """Refuse a folder of pictures that cannot be made, or that has links out of it."""
    if folder is not None:
        check_pictures("--report")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        check_outputs({"--report": parent / "report"})
        for file in folder.glob("*"):
            check_within(file)


def check_pictures(flag: str) -> None:
    """Refuse to draw where matplotlib is not installed, before any long work starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{flag} needs matplotlib; run: pip install 'layerskip[plot]'")
