"""Two CPU processes (gloo) against one process that accumulates their batches, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from layerskip.recipe import attach
from layerskip.training.callbacks import read_log
from trainer_setup import DROPPING, train_by_hand


def one_process(model_folder, accumulation=1):
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    return train_by_hand(model, attach(model, DROPPING), own=[0, 1], accumulation=accumulation)


HERE = Path(__file__).parent


def in_two_processes(*command):
    paths = [str(HERE.parent), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *torchrun, *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


def run(model_folder, output, kind):
    done = in_two_processes(HERE / "two_processes.py", model_folder, output, kind)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("ddp_and_resume", "model_folder"),
        pytest.param("fsdp2", "model_folder", marks=pytest.mark.long),
        pytest.param("fsdp2_with_the_exit_apart", "tied_model_folder", marks=pytest.mark.long),
        pytest.param("ddp", "tied_model_folder", marks=pytest.mark.long),
        pytest.param("fsdp2", "tied_model_folder", marks=pytest.mark.long),
        pytest.param("fsdp2_with_the_exit_apart", "model_folder", marks=pytest.mark.long),
    ],
)
def test_two_processes_train_as_one(request, tmp_path, kind, folder):
    model_folder = request.getfixturevalue(folder)
    result = run(model_folder, tmp_path, kind)
    assert result["losses"] == pytest.approx(one_process(model_folder), rel=1e-5)
    if kind.startswith(
        "ddp"
    ):  # the last batch is filled up for the second process with rows that were seen
        for exit_layer in (1, 4):
            loss = result["metrics"][f"eval_loss_exit_{exit_layer}"]
            assert loss == pytest.approx(result["expected"][str(exit_layer)], rel=1e-5)


@pytest.mark.long
def test_two_processes_accumulate_as_one(model_folder, tmp_path):
    result = run(model_folder, tmp_path, "ddp_accumulating")
    assert result["losses"] == pytest.approx(one_process(model_folder, 2), rel=1e-5)


@pytest.mark.long
def test_the_command_trains_in_two_processes(model_folder, data_file, tmp_path):
    """Each has half of the rows of a step; one of them writes, and what it writes is whole."""
    settings = {"model": model_folder, "data": data_file, "output": tmp_path / "out"}
    settings |= {"batch-size": 2, "max-steps": 3, "log-steps": 1, "save-steps": 2, "eval-rows": 4}
    settings |= {"fixed-exits": 2, "curriculum": "none", "device": "cpu"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    script = Path(sys.executable).with_name("layerskip")
    done = in_two_processes("--no-python", script, "train", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file(), done.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    steps = [log["step"] for log in read_log(tmp_path / "out" / "train_log.jsonl") if "loss" in log]
    assert steps == [1, 2, 3]
