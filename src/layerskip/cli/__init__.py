"""The command line: one file a command; each parses, calls the library, and prints."""

import sys

try:
    from layerskip.cli.main import layerskip_command, main, run
except KeyboardInterrupt:  # before `main` handles it
    sys.stderr.write("layerskip: interrupted\n")
    raise SystemExit(130) from None

__all__ = ["layerskip_command", "main", "run"]
