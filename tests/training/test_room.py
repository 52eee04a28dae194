"""What checkpoints will take, against what the disk has."""

import shutil
import warnings

import pytest
import torch

from layerskip.errors import TrainingWarning
from layerskip.training import checkpointing as room
from layerskip.training.checkpointing import warn_low_disk_space


@pytest.fixture
def model():
    """1,000 parameters, of which 100 are trained."""
    model = torch.nn.ParameterList([torch.zeros(100), torch.zeros(900)])
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("there", "needed"), [(0, 3 * 1200 + 4000), (2, 1200 + 4000), (5, 1200 + 4000)]
)
def test_a_disk_with_too_little_room_is_told_of(model, tmp_path, monkeypatch, there, needed):
    for step in range(there):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def free(n):
        usage = shutil.disk_usage(tmp_path)._replace(free=n)
        monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage)

    free(needed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_low_disk_space(model, tmp_path, keep=2)
    free(needed - 1)
    with pytest.warns(TrainingWarning, match=r"may take 0\.0 GB.*keep_checkpoints is 2"):
        warn_low_disk_space(model, tmp_path, keep=2)
