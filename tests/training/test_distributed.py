"""Two CPU processes (gloo) against one process that accumulates their batches, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerskip.recipe import attach
from layerskip.training.data import Collator
from trainer_setup import DROPPING, arguments, rows


def one_process(model_folder, steps=3):
    """Both processes' batches in turn, with the rows that both draw alike; AdamW as Trainer's."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    handle = attach(model, DROPPING)
    settings = arguments("unused")
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    data, losses = rows(), []
    for step in range(steps):
        batches = [Collator(0)(data[start : start + 4]) for start in (8 * step, 8 * step + 4)]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        total = 0.0
        for batch in batches:
            handle.set_step(step, steps)  # each process counts its own micro-batches
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:  # Trainer's linear decay
            group["lr"] = settings.learning_rate * (steps - step) / steps
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(model_folder, tmp_path, kind):
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
            str(here / "two_processes.py"), model_folder, str(tmp_path), kind,
        ],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    losses = [log["loss"] for log in result["logs"]]
    assert losses == pytest.approx(one_process(model_folder), rel=1e-5)
    assert {"eval_loss_exit_1", "eval_loss_exit_4"} <= {*result["metrics"]}
