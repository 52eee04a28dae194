"""Each of the paper's experiments runs in its smoke setting, and leaves what was measured alone."""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import paper.checkpoints
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VARIANTS = {
    "pretrain": 8,
    "continual": 3,
    "domain": 3,
    "task": 4,
    "kvq": 2,
    "speculation": 1,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_DATA", "")  # `task` sets it to rows that it makes up

    def run(name, *more):
        output, work = tmp_path / f"{name}.json", tmp_path / "work"
        words = [name, "--smoke", "--threads", "1", "--output", str(output), "--work", str(work)]
        monkeypatch.setattr(sys, "argv", [*words, *more])
        importlib.import_module(f"paper.{name}").main()
        return json.loads(output.read_text())

    return run


def refuse(*_, **__):
    raise AssertionError("this was measured already")


@pytest.mark.filterwarnings("ignore::layerskip.training.data.LeftOutWarning")  # short rows alone
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name not in ("kvq", "speculation") else name
        for name in VARIANTS
    ],
)
def test_smoke_run_and_the_same_again(run, name, monkeypatch):
    document = run(name)
    assert document["smoke"]
    assert len(document["rows"]) == VARIANTS[name]
    for row in document["rows"]:
        assert {"command", "commit", "date", "cpu", "threads"} <= row["environment"].keys()
        assert row["environment"]["command"].startswith("python -m paper." + name)
        assert row["model"]
        learnt = row.get("trained")
        if learnt:
            assert learnt["steps"] == 2
            assert 0 < learnt["tokens"] <= learnt["rows"] * 96
    monkeypatch.setattr(paper.checkpoints, "train", refuse)
    monkeypatch.setattr("layerskip.LayerSkipModel.from_pretrained", refuse)
    if name != "kvq":  # which needs its model to know its rows
        assert run(name) == document


@pytest.mark.long
def test_variants_of_pretraining_differ_in_the_recipe_alone(run):
    names = "baseline,EE,LD+EE,LD+EE gradual"
    rows = {row["variant"]: row for row in run("pretrain", "--variants", names)["rows"]}
    assert len({row["trained"]["tokens"] for row in rows.values()}) == 1
    assert all([e["exit_layer"] for e in row["exits"]] == [1, 2, 3, 4] for row in rows.values())
    figures = {name: row["exits"][-1]["token_perplexity"] for name, row in rows.items()}
    assert figures["EE"] != figures["baseline"]
    assert (
        figures["LD+EE"] != figures["LD+EE gradual"]
    )  # two steps and rows: nothing is dropped yet
    recipe = rows["LD+EE gradual"]["trained"]["recipe"]
    assert (recipe["curriculum"], recipe["variant"], recipe["p_max"]) == ("gradual", "LD+EE", 0.1)


def test_other_settings_are_refused_unless_begun_anew(run):
    few = ("--variants", "baseline")
    before = run("pretrain", *few)
    assert before["smoke"]
    assert before["rows"][0]["trained"]["steps"] == 2
    with pytest.raises(SystemExit, match="other settings"):
        run("pretrain", *few, "--learning-rate", "0.1")
    after = run("pretrain", *few, "--learning-rate", "0.1", "--again")
    assert len(before["rows"]) == len(after["rows"]) == 1
    assert after["rows"][0]["trained"]["learning_rate"] == 0.1
    assert after["rows"][0]["exits"] != before["rows"][0]["exits"]
    with pytest.raises(SystemExit, match="no variant"):
        run("pretrain", "--variants", "LD+EEE")


def test_minutes_that_are_over_begin_no_variant(run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"pretrain\.json"):  # of what it did not write
        run("pretrain", "--minutes", "0")
    assert "the minutes are over" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("*/model.safetensors"))


def test_an_interrupted_variant_goes_on(run, monkeypatch):
    started = []
    learn = paper.checkpoints.train

    def stopped(config, **more):
        started.append(config)
        (Path(config.output) / "checkpoint-1").mkdir(parents=True)
        written = json.dumps(config.as_flat_dict())
        (Path(config.output) / "train.json").write_text(written)
        raise KeyboardInterrupt

    def goes_on(config, **more):
        started.append(config)
        shutil.rmtree(config.output)
        return learn(replace(config, resume=False), **more)

    few = ("--variants", "baseline")
    monkeypatch.setattr(paper.checkpoints, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("pretrain", *few)
    monkeypatch.setattr(paper.checkpoints, "train", goes_on)
    monkeypatch.setattr(
        paper.checkpoints, "last_checkpoint", lambda folder: folder / "checkpoint-1"
    )
    assert len(run("pretrain", *few)["rows"]) == 1
    assert [config.resume for config in started] == [False, True]
