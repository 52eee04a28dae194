"""Logit lens: the predictions of every exit layer."""

from layerskip.lens.lens import Agreement, Lens, Round, Symbols, look, rounds, visible
from layerskip.lens.report import Report, report_on

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
