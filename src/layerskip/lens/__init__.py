"""The lens: what every layer would have said."""

from layerskip.lens.agreement import Agreement
from layerskip.lens.lens import Lens, look
from layerskip.lens.report import Report, report_on
from layerskip.lens.rounds import Round, rounds
from layerskip.lens.symbols import Symbols, visible

__all__ = [
    "Agreement",
    "Lens",
    "Report",
    "Round",
    "Symbols",
    "look",
    "report_on",
    "rounds",
    "visible",
]
