"""The program: its commands, streams, signals and exit status."""

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

import layerskip
from layerskip.cli.completion import stand_in
from layerskip.cli.output import Terminated, log_stderr, one_line_warnings

# Name -> module and short description.
_COMMANDS = {
    "demo": ("demo", "compare plain decoding with mode auto on a real model"),
    "pull": ("pull", "fetch a model into the cache"),
    "list": ("list", "list the models in the cache"),
    "rm": ("rm", "remove a model from the cache"),
    "generate": ("generate", "answer a prompt"),
    "chat": ("chat", "talk with a model"),
    "serve": ("serve", "serve a model to clients of OpenAI's API, with a chat page"),
    "index": ("data", "build an n-gram datastore from a long text"),
    "tune": ("tune", "find the fastest exit layer and draft length for your prompts"),
    "train": ("train", "train a checkpoint's early exits with the LayerSkip recipe"),
    "adapt": ("adapt", "train an exit adapter, which drafts for a model that stays as it is"),
    "bench": ("bench", "compare all modes, and other systems, on a task"),
    "eval": ("eval", "evaluate every exit: lm-evaluation-harness, perplexity"),
    "lens": ("lens", "show what every layer would predict"),
    "export": ("export", "write a checkpoint for other programs"),
}
_OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|out of memory")  # in PyTorch's messages
_LESS_MEMORY = {
    "train": "a smaller --batch-size with more --accumulation, a smaller --max-length,"
    " --gradient-checkpointing or --lora-rank 16",
    "export": "a machine with more memory, or a smaller model",
    "": "--dtype bfloat16, a smaller model or, on a CPU, --weights int8",
}
_CPP_STACK = " Exception raised from "  # PyTorch puts a C++ stack behind this
_BROKEN_PIPE_STATUS = 141  # 128 + SIGPIPE, as shells report it
_LONGEST_MESSAGE = 1_000  # characters


class _BrokenPipe(Exception):  # noqa: N818 - not an error of ours
    """The reader of stdout has closed it."""


class _Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM; click would print an empty line for a KeyboardInterrupt."""


class Signals:
    """Handler of Ctrl-C and SIGTERM.

    While the program starts there is nothing to keep, and an exception could end up inside the import
    of a library: the program ends at once. Later both raise KeyboardInterrupt.

    Attributes:
        starting: True until a command has been imported.
        received: the last signal.
    """

    def __init__(self) -> None:
        self.starting = True
        self.received: int | None = None
        self._pid = os.getpid()

    def install(self) -> None:
        """Handle both signals, except where whoever started the program has them ignored."""
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, default in defaults.items():
            if signal.getsignal(number) is default:
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal."""
        if os.getpid() != self._pid:  # a process that a library has forked
            os._exit(128 + number)
        self.received = number
        if self.starting:
            os.write(2, f"layerskip: {self.word}\n".encode())
            os._exit(128 + number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    @property
    def word(self) -> str:
        """One word for the last signal."""
        return "terminated" if self.received == signal.SIGTERM else "interrupted"


@contextlib.contextmanager
def _own_exceptions() -> Iterator[None]:
    """Replace exceptions that click would handle by ending the program itself."""
    try:
        yield
    except OSError as error:
        on_windows = os.name == "nt" and error.errno == errno.EINVAL
        if not (isinstance(error, BrokenPipeError) or on_windows):
            raise
        raise _BrokenPipe from error
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        raise _BrokenPipe from error  # raised by rich inside a table
    except KeyboardInterrupt as error:
        raise _Interrupted from error


class _Commands(click.Group):
    """Imports a command's module only when it is called, so that --help answers at once."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        with _own_exceptions():  # of the text of --help or --version
            try:
                return super().make_context(info_name, args, parent, **extra)
            except click.exceptions.NoArgsIsHelpError as error:
                print(error.format_message(), flush=True)
                raise click.UsageError("name a command, such as layerskip demo") from None

    def invoke(self, ctx: click.Context) -> Any:
        with _own_exceptions():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        if ctx.resilient_parsing:  # the shell asks for completions
            return stand_in(cmd_name, _COMMANDS[cmd_name][1])
        command: click.Command = importlib.import_module(
            f"layerskip.cli.{_COMMANDS[cmd_name][0]}"
        ).command
        if isinstance(ctx.obj, dict) and (signals := ctx.obj.get("signals")):
            signals.starting = False
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(layerskip.__version__, prog_name="layerskip")
def layerskip_command() -> None:
    """Make one language model faster by itself.

    Early layers draft tokens, the remaining layers verify them: the same answers, sooner.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 on success, 2 for a usage error, 1 for a failure.

    The status is 130 after Ctrl-C, 143 after SIGTERM, and 141 where the reader of stdout has left.
    """
    signals = Signals()
    signals.install()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(newline=None)  # universal line ends, as in files
    for stream in (sys.stdin, sys.stdout):
        if os.name == "nt" and isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")  # instead of the system's code page
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # code pages lack characters
    status = run(sys.argv[1:] if arguments is None else arguments, signals)
    gc.freeze()  # or a last collection of all objects takes a third of a second
    sys.exit(status)


def run(arguments: Sequence[str], signals: Signals | None = None) -> int:
    """Run the program and return its exit status; a failure is one line on stderr."""
    state = {"debug": False, "signals": signals}
    try:
        with _quiet_libraries(debug="--debug" in arguments), one_line_warnings():
            status = layerskip_command.main(
                list(arguments), prog_name="layerskip", standalone_mode=False, obj=state
            )
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "layerskip"
        message = " ".join(error.format_message().split()).rstrip(".")
        log_stderr(f"{message} (see {command} --help)")
        return 2
    except (click.Abort, KeyboardInterrupt, _Interrupted):
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has echoed ^C
        log_stderr(signals.word if signals else "interrupted")
        return 128 + ((signals and signals.received) or signal.SIGINT)
    except _BrokenPipe:  # not a failure of ours, but something may be left undone
        _discard_stdout()
        return _BROKEN_PIPE_STATUS
    except Exception as error:
        if state["debug"]:
            raise
        log_stderr(_one_line(error, arguments[0] if arguments else ""))
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            _discard_stdout()
        return 1
    return status if isinstance(status, int) else 0


@contextlib.contextmanager
def _quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Silence the log lines of other libraries, which would come before our own line."""
    level = logging.root.manager.disable
    if not debug:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def _discard_stdout() -> None:
    """Drop unwritten output, or Python tries again at exit and prints a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception, command: str) -> str:
    text = " ".join(str(error).split()).split(_CPP_STACK)[0][:_LONGEST_MESSAGE]
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return f"{name[:80]}... ({len(name):,} characters) is too long for the name of a file"
    if isinstance(error, ValueError | OSError | ImportError | click.ClickException) and text:
        return text
    out_of_memory = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)
    if isinstance(error, MemoryError) or out_of_memory:
        return f"out of memory; try {_LESS_MEMORY.get(command, _LESS_MEMORY[''])}"
    return f"{type(error).__name__}: {text} (--debug shows the traceback)"
