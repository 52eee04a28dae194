"""Tuning: measured costs and acceptance to the best exit layer and draft length of this machine."""

from layerskip.tune.tune import Choice, Effort, Tuning, effort_for, tune, write_settings

__all__ = ["Choice", "Effort", "Tuning", "effort_for", "tune", "write_settings"]
