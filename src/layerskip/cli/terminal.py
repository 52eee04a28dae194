"""What a terminal is sent: text that others wrote, and nothing that it would obey."""

import logging
import re
import sys

# All of C0 and C1 but tab, line feed and carriage return: sequences that set titles or the clipboard.
_OBEYED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """The text with the codes of control characters in their place."""
    return _OBEYED.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def tell(line: str) -> None:
    """A line of ours on stderr, beside what is asked for."""
    print(f"layerskip: {harmless(line)}", file=sys.stderr)


class HarmlessRecord(logging.LogRecord):
    """A line of a library's log, which may repeat what a checkpoint says."""

    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        """The message."""
        return harmless(super().getMessage())
