"""Whether the disk has room for a run's checkpoints, asked before it trains for hours."""

import shutil
import warnings
from pathlib import Path

from torch import nn

from layerskip.training.checkpoints import count_checkpoints
from layerskip.training.errors import TrainingWarning

_CHECKPOINT_BYTES = 12  # of a trained parameter: itself and two moments of AdamW, in float32
_RESULT_BYTES = 4


def warn_of_little_room(model: nn.Module, output: Path, keep: int) -> None:
    """Warn where the disk seems to have less room than checkpoints and result will take.

    It is no error: what a file system calls free may be less or more than it takes, with quotas,
    compression or shared blocks, the run may end before it has `keep` checkpoints, and where the disk
    is full the last ones are kept.

    Args:
        model: what is trained, before it is divided among processes.
        output: the folder of the run.
        keep: checkpoints that stay; one more is there while it is written.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    missing = max(keep + 1 - count_checkpoints(output), 1)
    of_checkpoints = missing * _CHECKPOINT_BYTES * sum(n for n, is_trained in sizes if is_trained)
    needed = of_checkpoints + _RESULT_BYTES * sum(n for n, _ in sizes)
    free = shutil.disk_usage(output).free
    if free < needed:
        warnings.warn(
            f"checkpoints and result may take {needed / 1e9:.1f} GB, and {output} has"
            f" {free / 1e9:.1f} GB free: make room, or keep fewer (keep_checkpoints is {keep})",
            TrainingWarning,
            stacklevel=2,
        )
