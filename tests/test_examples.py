"""Each example runs, on a tiny checkpoint and for a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.training import TrainConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tiny_checkpoint.save(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)  # as checkpoints are stored
    return folder


@pytest.mark.parametrize(
    ("script", "launcher", "steps"),
    [
        ("plain_trainer.py", (), "--max-steps"),
        ("trl_sft.py", (), "--max-steps"),
        ("accelerate_loop.py", TWO_PROCESSES, "--steps"),
    ],
)
def test_scripts(model_folder, tmp_path, script, launcher, steps):
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    field = {"text": "0 1 2 3 4 5 6 7 8 9"} if launcher else {"prompt": "1+1=", "completion": "2"}
    data.write_text(20 * (json.dumps(field) + "\n"))
    done = subprocess.run(
        [
            *(sys.executable, *launcher, str(EXAMPLES / script), steps, "3"),
            *("--model", str(model_folder), "--data", str(data), "--output", str(output)),
            *("--exit-layer", "2"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    # gloo's own threads now and then abort a process that has already ended its work.
    assert done.returncode == 0 or launcher, done.stderr[-3000:]
    assert (output / "model.safetensors").exists(), done.stderr[-3000:]
    assert "loss" in done.stdout
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, output))
    assert before.keys() == after.keys()
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    assert {t.dtype for t in after.values()} == {torch.float32}
    # Updates of 1e-4 that bfloat16 would lose: those of norm weights, which are about 1.
    norms = [name for name in before if "norm" in name]
    assert all((before[name].float() != after[name]).any() for name in norms)
    assert json.loads((output / "config.json").read_text()).get("use_cache", True) is True
    settings = json.loads((output / "generation_config.json").read_text())
    assert settings["assistant_early_exit"] == 2
    answer = LayerSkipModel.from_pretrained(output, dtype="float32").generate(
        "1+1=", max_new_tokens=2, ignore_eos=True
    )
    assert (answer.mode, answer.exit_layer) == ("self-speculative", 2)


def test_settings_fit_smollm2():
    for path in EXAMPLES.rglob("*.yaml"):
        config = TrainConfig.from_yaml(path, data="rows.jsonl", output="out")
        assert config.model == "smollm2-135m", path
        config.effective_recipe.check_layers(30)
