"""Tuning: measured costs and acceptance to the best exit layer and draft length of this machine."""

from layerskip.tuning.choose import Choice
from layerskip.tuning.effort import Effort, effort_for
from layerskip.tuning.run import Tuning, tune
from layerskip.tuning.settings import write_settings

__all__ = ["Choice", "Effort", "Tuning", "effort_for", "tune", "write_settings"]
