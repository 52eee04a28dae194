"""Measuring a checkpoint of several tasks, and the card that is written from it."""

import argparse
import json
import re

import checkpoint
import pytest
from checkpoint import measure
from checkpoint_card import card

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.training import TrainConfig

PROMPTS = ["1+1=", "2+2=", "3+3="]
MIXTURE = {
    "seed": 7,
    "rows": 30,
    "sources": {
        "sums": {"data": "sums of two numbers", "licence": "MIT", "rows": 20, "twice": 0},
        "words": {"data": "words", "licence": "CC BY 4.0", "rows": 10, "twice": 4},
    },
    "files": {"train.jsonl": {"rows": 30, "sha256": "abc123"}},
}


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
    (held_out / "mixture.json").write_text(json.dumps(MIXTURE))
    (tmp_path / "topv2").mkdir()
    table = "domain\tutterance\tsemantic_parse\nalarm\twake me\t[IN:X ]\n"
    (tmp_path / "topv2" / "alarm_test.tsv").write_text(table)
    monkeypatch.setenv("LAYERSKIP_DATA", str(tmp_path))
    (tmp_path / "text.txt").write_text("A mill was built of red brick.")
    control = tiny_checkpoint.save(tmp_path / "control")
    write_run(model, fixed_exits=[1])
    write_run(control, p_max=0, curriculum="none")
    return measure(
        argparse.Namespace(
            checkpoint=str(model),
            control=str(control),
            held_out=held_out,
            rows=10,
            words=100,
            text=str(tmp_path / "text.txt"),
            dtype="float32",
            weights="16bit",
            exits=(1, 3, 8),
            early_exit=False,
        )
    )


def test_quality_drafts_and_perplexity_are_measured(measured):
    ours, control = measured["checkpoint"], measured["control"]
    assert ours["tasks"].keys() == {"sums", "topv2"}
    assert ours["tasks"]["sums"]["samples"] == len(PROMPTS)
    assert ours["tasks"]["sums"]["quality"]["exact_match"] == 1.0
    assert ours["tasks"]["topv2"]["quality"] == {"exact_match": 0.0}  # the catalogue's measure
    exits = ours["tasks"]["sums"]["exits"]
    assert [row["exit_layer"] for row in exits] == [1, 3]  # the model has 4 layers
    assert 0 <= exits[0]["agreement"] < exits[1]["agreement"] < 1
    assert all(1 <= row["mean_accepted_length"] <= 5 for row in exits)
    assert ours["perplexity"]["word_perplexity"] > 1
    # The control has the same weights here, so the same answers.
    assert control["tasks"]["sums"]["quality"] == ours["tasks"]["sums"]["quality"]
    assert control["perplexity"] == ours["perplexity"]
    assert "exits" not in control["tasks"]["sums"]
    assert ours["training"]["step"] == 40


def test_the_card_has_the_figures_and_where_they_come_from(measured):
    text = card(json.loads(json.dumps(measured)), "my-model", "2 cores")
    assert text.startswith("# my-model\n")
    assert "SmolLM2-135M-Instruct, Apache-2.0" in text
    assert "| sums of two numbers | 20 | MIT |" in text
    assert "seed 7 (`train.jsonl`, sha256 abc123)" in text
    assert "4 rows stand in it twice: words." in text
    assert "- budget: 40 steps of 8 rows" in text
    assert "- time: 10 minutes" in text
    assert "- hardware: 2 cores" in text
    assert "max_steps: 40\n" in text
    assert "fixed_exits: [1]\n" in text
    assert "warmup_steps" not in text  # a default
    assert "output:" not in text
    assert '`p_max: 0.0`, `curriculum: "none"`, `fixed_exits: []`' in text
    assert "| sums | 3 | exact_match | 100.0% | 100.0% |" in text
    assert (
        f"word perplexity | {measured['checkpoint']['perplexity']['word_perplexity']:.2f} |" in text
    )
    row = measured["checkpoint"]["tasks"]["sums"]["exits"][1]
    assert f"| sums | 3 | {row['agreement']:.1%} | {row['acceptance_rate']:.1%} |" in text
    assert f"{1 - row['agreement']:.1%} of the tokens" in text


def test_the_card_names_all_runs_that_made_a_checkpoint(measured, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    for folder, rows in ((first, 20), (second, 7)):
        mixture = json.loads(json.dumps(MIXTURE))
        mixture["sources"]["sums"]["rows"] = rows
        (folder / "mixture.json").write_text(json.dumps(mixture))
    write_run(first, p_max=0.25, data=str(first / "rows.jsonl"))
    (first / "average.json").write_text('{"base": "smollm2-135m", "share": 0.75}')
    write_run(second, model=str(first), data=str(second / "rows.jsonl"))
    measured["checkpoint"]["training"] = checkpoint.training_record(second)
    text = card(json.loads(json.dumps(measured)), trained_on="2 cores")
    assert "SmolLM2-135M-Instruct, Apache-2.0" in text
    parts = ("run 1 of 2", "p_max: 0.25", "run 2 of 2", f"model: {json.dumps(str(first))}")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("- budget: 40 steps of 8 rows") == 2
    assert text.count("- hardware: 2 cores") == 1
    assert "| trained on | rows, run 1 | rows, run 2 | licence |" in text
    assert "| sums of two numbers | 20 | 7 | MIT |" in text
    assert text.count("afterwards: 75% of what had changed since smollm2-135m was kept") == 1


def test_a_card_of_an_own_checkpoint_leaves_out_what_is_not_known(measured):
    measured["mixture"] = measured["checkpoint"]["training"] = None
    del measured["control"]
    text = card(measured)
    assert text.startswith("# ")
    assert "licence" not in text
    assert "## Training" not in text
    assert not re.search(r"\bcontrol\b", text.lower())
    assert "| sums | 3 | exact_match | 100.0% |\n" in text


def test_a_folder_without_held_out_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no test-NAME"):
        checkpoint.held_out_tasks(tmp_path, 3)
