"""Each example runs, on a tiny checkpoint and for a few steps."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.cli.config_flags import ModelConfig
from layerskip.cli.demo_train import exit_of, train_config
from layerskip.training import TrainConfig, train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tiny_checkpoint.save(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)  # as checkpoints are stored
    return folder


def write_extraction_rows(file, *flags):
    command = [sys.executable, EXAMPLES / "extraction.py", file, "--rows", "20", *flags]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=600)


@pytest.fixture
def flags(model_folder, tmp_path):
    """Flags of a script for the rows of `tmp_path`."""

    def write(steps):
        paths = {
            "--model": model_folder,
            "--data": tmp_path / "rows.jsonl",
            "--output": tmp_path / "out",
        }
        words = [str(word) for pair in paths.items() for word in pair]
        return [*words, steps, "3", "--exit-layer", "2"]

    return write


@pytest.mark.filterwarnings("ignore")  # of TRL and its dependencies
@pytest.mark.parametrize("script", ["plain_trainer.py", "trl_sft.py"])
def test_scripts(script, flags, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_extraction_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sys, "argv", [script, *flags("--max-steps")])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert "loss" in capsys.readouterr().out
    check_checkpoint(model_folder, tmp_path / "out")


def test_accelerate_loop_in_two_processes(flags, model_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(20 * '{"text": "0 1 2 3 4 5 6 7 8 9"}\n')
    done = subprocess.run(
        [
            *(sys.executable, *TWO_PROCESSES, str(EXAMPLES / "accelerate_loop.py")),
            *flags("--steps"),
        ],
        env=ENVIRONMENT,
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    # The status is not checked: gloo's threads may abort a process that has ended its work.
    assert (tmp_path / "out" / "model.safetensors").exists(), done.stderr[-3000:]
    assert "loss" in done.stdout
    check_checkpoint(model_folder, tmp_path / "out")


def check_checkpoint(model_folder, output):
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


def test_extraction_settings_are_those_of_the_demo(tmp_path):
    output = tmp_path / "out"
    data = str(output / "rows.jsonl")
    example = TrainConfig.from_yaml(EXAMPLES / "extraction.yaml", data=data, output=str(output))
    demo = train_config(ModelConfig(model=example.model), exit_of(30), 10.0, output)
    own = {"device", "log_steps", "save_steps", "prompt_form", "prompt_example"}
    differences = {k for k, v in demo.as_flat_dict().items() if v != example.as_flat_dict()[k]}
    assert differences <= own


@pytest.mark.filterwarnings("ignore:.* of 20 rows of")  # too long: a byte is a token here
def test_extraction_rows_train_a_checkpoint(model_folder, tmp_path):
    """With `layerskip train`; the test of the scripts has the same rows for both Trainers."""
    write_extraction_rows(tmp_path / "rows.jsonl")
    changes = {"model": str(model_folder), "fixed_exits": [2], "exit_layer": 2}
    result = train(
        TrainConfig.from_yaml(
            EXAMPLES / "extraction.yaml",
            data=str(tmp_path / "rows.jsonl"),
            output=str(tmp_path / "out"),
            device="cpu",
            max_steps=2,
            warmup_steps=0,
            **changes,
        )
    )
    model = LayerSkipModel.from_pretrained(result.output, dtype="float32")
    assert (model.settings.exit_layer, model.settings.prompt_form.ending) == (2, "\n")
