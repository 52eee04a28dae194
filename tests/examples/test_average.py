"""examples/checkpoint/average.py: between two checkpoints."""

import json

import average as averaging
import pytest
import torch
import weight_deltas
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerskip import LayerSkipModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("average")
    base = weight_deltas.base(root / "base")
    return base, weight_deltas.trained(base, root / "trained")


def test_a_share_of_what_training_changed_is_kept(folders, tmp_path):
    base, trained = folders
    averaging.average(trained, str(base), tmp_path / "out", 0.75)
    found, before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tmp_path / "out", base, trained)
    )
    for name, weight in found.items():
        expected = before[name] + 0.75 * (after[name] - before[name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == (
        load_file(trained / "model.safetensors").keys()
    )
    # The checkpoint's settings travel along, and it answers.
    assert LayerSkipModel.from_pretrained(tmp_path / "out").settings.exit_layer == 2
    # What 4 bits cost the trained weights is not known of these.
    fields = json.loads((tmp_path / "out" / "generation_config.json").read_text())["layerskip"]
    assert fields == {"draft_vocabulary": "5 6 7"}
    note = json.loads((tmp_path / "out" / "average.json").read_text())
    assert note == {"base": str(base), "share": 0.75}


def test_what_cannot_be_averaged_is_said(folders, tmp_path):
    for share, output, message in ((1.5, "new", "from 0 to 1"), (0.5, "base", "is there already")):
        base, trained = folders
        where = base if output == "base" else tmp_path / output
        with pytest.raises(ValueError, match=message):
            averaging.average(trained, str(base), where, share)


def test_other_models_are_refused(folders, tmp_path):
    other = weight_deltas.base(tmp_path / "other", case="llama2")
    with pytest.raises(ValueError, match="of this shape"):
        averaging.average(folders[1], str(other), tmp_path / "out")
