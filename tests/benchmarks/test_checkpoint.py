"""Measuring a checkpoint on one or several tasks."""

import argparse
import json

import checkpoint
import pytest
from checkpoint import measure

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.training import TrainConfig

PROMPTS = ["1+1=", "2+2=", "3+3="]


def write_run(folder, **changes):
    settings = {"model": "smollm2-135m", "data": "rows.jsonl", "output": "x", "regime": "task"}
    config = TrainConfig.from_mapping({**settings, "max_steps": 40, "seed": 3, **changes})
    (folder / "train.json").write_text(json.dumps(config.as_flat_dict()))
    logs = [
        {"step": 20, "loss": 1.0, "peak_memory_bytes": 2**31},
        {"step": 40, "train_runtime": 600.0},
        {"step": 40, "eval_loss": 1.0},
    ]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def answers(model):
    loaded = LayerSkipModel.from_pretrained(model, dtype="float32")
    return [made.text for made in loaded.generate(PROMPTS, mode="plain", max_new_tokens=256)]


@pytest.fixture
def measured(model, answers, tmp_path, monkeypatch):
    """Two tasks: one whose references are the model's own answers, one of the catalogue."""
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    rows = [{"prompt": p, "reference": a} for p, a in zip(PROMPTS, answers, strict=True)]
    (held_out / "test-sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (held_out / "test-topv2.jsonl").write_text("{}\n")  # its rows are not asked
    (tmp_path / "topv2").mkdir()
    table = "domain\tutterance\tsemantic_parse\nalarm\twake me\t[IN:X ]\n"
    (tmp_path / "topv2" / "alarm_test.tsv").write_text(table)
    monkeypatch.setenv("LAYERSKIP_DATA", str(tmp_path))
    (tmp_path / "text.txt").write_text("A mill was built of red brick.")
    write_run(model, fixed_exits=[1])
    return measure(
        argparse.Namespace(
            checkpoint=str(model),
            held_out=held_out,
            rows=10,
            words=100,
            text=str(tmp_path / "text.txt"),
            dtype="float32",
            weights="16bit",
            exits=(1, 3, 8),
            unseen=None,
            early_exit=False,
        )
    )


def test_quality_drafts_and_perplexity_are_measured(measured):
    ours = measured["checkpoint"]
    assert ours["tasks"].keys() == {"sums", "topv2"}
    assert ours["tasks"]["sums"]["samples"] == len(PROMPTS)
    assert ours["tasks"]["sums"]["quality"]["exact_match"] == 1.0
    assert ours["tasks"]["topv2"]["quality"] == {"exact_match": 0.0}  # the catalogue's measure
    exits = ours["tasks"]["sums"]["exits"]
    assert [row["exit_layer"] for row in exits] == [1, 3]  # the model has 4 layers
    assert 0 <= exits[0]["agreement"] < exits[1]["agreement"] < 1
    assert all(1 <= row["mean_accepted_length"] <= 5 for row in exits)
    assert ours["perplexity"]["word_perplexity"] > 1
    assert ours["training"]["step"] == 40
    assert measured.keys() == {"draft_tokens", "text", "environment", "checkpoint"}


def test_prompts_of_the_training_rows_are_left_out(tmp_path):
    rows = [{"prompt": f"{text}\n", "reference": "x"} for text in ("wake me", "Play  SOUL", "stop")]
    (tmp_path / "test-a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "seen.tsv").write_text("utterance\tparse\nplay soul\tx\n")
    (task,) = checkpoint.held_out_tasks(tmp_path, 3).values()
    left = checkpoint.unseen(task, str(tmp_path / "seen.tsv"))
    assert [sample.prompt for sample in left.samples] == ["wake me\n", "stop\n"]


def test_a_folder_without_held_out_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no test-NAME"):
        checkpoint.held_out_tasks(tmp_path, 3)
