"""Deprecated name of `layerskip.tune`."""

from collections.abc import Sequence
from typing import Any

from layerskip import tune as _tune
from layerskip.decoding import LayerSkipModel
from layerskip.tune import Choice, Tuning, write_settings

__all__ = ["Choice", "Tuning", "tune", "write_settings"]


def tune(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    *,
    exits: Sequence[int] | None = None,
    **options: Any,
) -> Tuning:
    """Call `layerskip.tune.tune`, where `exits` is `exit_layers`."""
    return _tune.tune(model, prompts, exit_layers=tuple(exits or ()), **options)
