"""The command line: one file a command; each parses, calls the library, and prints."""

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

import layerskip
from layerskip.cli.output import EscapedRecord, log_stderr

_COMMANDS = {
    "demo": "plain decoding and mode auto side by side on a real model",
    "pull": "fetch a built-in model into the cache",
    "generate": "answer a prompt",
    "chat": "talk with a model",
    "index": "make a table of a long text that drafts are looked up in",
    "tune": "find the fastest exit layer and draft length for your prompts here",
    "train": "teach a checkpoint's early layers to answer",
    "bench": "all modes, and other systems, side by side on a task",
    "eval": "what every exit is worth: lm-evaluation-harness, perplexity",
    "lens": "what every layer would have said",
    "export": "write a checkpoint for other programs",
}
_NO_MEMORY = re.compile("DefaultCPUAllocator|out of memory")  # as PyTorch says it
_LESS_MEMORY = {
    "train": "a smaller --batch-size with more --accumulation, a smaller --max-length,"
    " --gradient-checkpointing or --lora-rank 16",
    "export": "a machine with more memory, or a smaller model",
    "": "--dtype bfloat16, a smaller model or, on a CPU, --weights int8",
}


_READER_LEFT = 141  # what a shell says of a program that ends so


class _ReaderLeftError(Exception):
    """Whoever read our output has left."""


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        on_windows = os.name == "nt" and error.errno == errno.EINVAL
        if not (isinstance(error, BrokenPipeError) or on_windows):
            raise
        raise _ReaderLeftError from error  # click would end the whole program here
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        raise _ReaderLeftError from error  # rich has met it in a table


class _Commands(click.Group):
    """Imports a command's module only when it is called, so that --help answers at once."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        with _reader_may_leave():  # of the text of --help or --version
            try:
                return super().make_context(info_name, args, parent, **extra)
            except click.exceptions.NoArgsIsHelpError as error:
                print(error.format_message(), flush=True)
                raise click.UsageError("name a command, such as layerskip demo") from None

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"layerskip.cli.{cmd_name}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(layerskip.__version__, prog_name="layerskip")
def layerskip_command() -> None:
    """Make one language model faster by itself.

    Early layers draft, the remaining layers verify: the same answers, sooner.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 on success, 2 for a usage error, 1 for a failure.

    130 is Ctrl-C, and 141 that whoever read the output has left before its end.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(newline=None)  # lines end as those of files do
    for stream in (sys.stdin, sys.stdout):
        if os.name == "nt" and isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")  # they have the system's code page there
    logging.setLogRecordFactory(EscapedRecord)
    for stream in (sys.stdout, sys.stderr):  # what a code page has not is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:] if arguments is None else arguments)
    gc.freeze()  # or Python looks for garbage among all objects before it ends, for a third of a second
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run the program and return its exit status; a failure is one line on stderr."""
    state = {"debug": False}
    try:
        status = layerskip_command.main(
            list(arguments), prog_name="layerskip", standalone_mode=False, obj=state
        )
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "layerskip"
        message = " ".join(error.format_message().split()).rstrip(".")
        log_stderr(f"{message} (see {command} --help)")
        return 2
    except (click.Abort, KeyboardInterrupt):
        log_stderr("interrupted")
        return 130
    except _ReaderLeftError:  # no failure of ours, but something may be left undone
        _drop_output()
        return _READER_LEFT
    except Exception as error:
        if state["debug"]:
            raise
        log_stderr(_one_line(error, arguments[0] if arguments else ""))
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            _drop_output()
        return 1
    return status if isinstance(status, int) else 0


def _drop_output() -> None:
    """What could not be written would be tried again at the very end, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception, command: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | ImportError | click.ClickException) and text:
        return text
    no_memory = isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    if isinstance(error, MemoryError) or no_memory:
        return f"out of memory; try {_LESS_MEMORY.get(command, _LESS_MEMORY[''])}"
    return f"{type(error).__name__}: {text} (--debug shows the traceback)"
