"""Tuning: measured costs and acceptance to the best exit layer and draft length of this machine."""

from layerskip.tune.tune import (
    Choice,
    SearchBudget,
    TuneConfig,
    Tuning,
    search_budget,
    tune,
    write_settings,
)

__all__ = [
    "Choice",
    "SearchBudget",
    "TuneConfig",
    "Tuning",
    "search_budget",
    "tune",
    "write_settings",
]
