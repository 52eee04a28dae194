"""The command line: one file a command; each parses, calls the library, and prints."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _signals_in_one_line() -> Iterator[None]:
    """End the program with one line on Ctrl-C and SIGTERM, before `main` handles them."""

    def terminated(*_: object) -> None:
        os.write(2, b"layerskip: terminated\n")
        os._exit(128 + signal.SIGTERM)

    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, terminated)
                stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        try:
            yield
        except KeyboardInterrupt:
            sys.stderr.write("layerskip: interrupted\n")
            raise SystemExit(130) from None


with _signals_in_one_line():
    from layerskip.cli.main import layerskip_command, main, run

__all__ = ["layerskip_command", "main", "run"]
