"""The command line: one file a command; each parses, calls the library, and prints."""

import os
import signal
from collections.abc import Callable
from types import FrameType

_HANDLED: dict[int, tuple[Callable[[int, FrameType | None], object] | signal.Handlers, bytes]] = {
    signal.SIGINT: (signal.default_int_handler, b"layerskip: interrupted\n"),
    signal.SIGTERM: (signal.SIG_DFL, b"layerskip: terminated\n"),
}


def _end(number: int, frame: object) -> None:
    """End the program with one line. An exception raised during an import could be lost."""
    os.write(2, _HANDLED[number][1])
    os._exit(128 + number)


def _replace_handlers(*, ours: bool) -> None:
    """Install our handlers of Ctrl-C and SIGTERM, or restore the defaults."""
    for number, (default, _) in _HANDLED.items():
        if signal.getsignal(number) is (default if ours else _end):
            try:
                signal.signal(number, _end if ours else default)
            except ValueError:  # not the main thread
                return


_replace_handlers(ours=True)  # until `main` does, whose imports take a tenth of a second
try:
    from layerskip.cli.main import layerskip_command, main, run
finally:
    _replace_handlers(ours=False)

__all__ = ["layerskip_command", "main", "run"]
