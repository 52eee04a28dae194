"""Two CPU processes (gloo) against one process that accumulates their batches, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from layerskip.recipe import attach
from trainer_setup import DROPPING, train_by_hand


def one_process(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    return train_by_hand(model, attach(model, DROPPING), own=[0, 1])


def run(model_folder, output, kind):
    here = Path(__file__).parent
    paths = [str(here.parent), str(here.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(here / "two_processes.py"), model_folder, str(output), kind,
        ],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(model_folder, tmp_path, kind):
    result = run(model_folder, tmp_path, kind)
    assert result["losses"] == pytest.approx(one_process(model_folder), rel=1e-5)
    if kind == "ddp":  # the last batch is filled up for the second process with rows that were seen
        for exit_layer in (1, 4):
            loss = result["metrics"][f"eval_loss_exit_{exit_layer}"]
            assert loss == pytest.approx(result["expected"][str(exit_layer)], rel=1e-5)


def test_two_processes_resume_with_the_rows_that_were_to_come(model_folder, tmp_path):
    run(model_folder, tmp_path, "resume")
