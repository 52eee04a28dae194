"""`layerskip tune`: what it writes, prints and refuses."""

import dataclasses
import importlib
import json
import shutil

import pytest

from layerskip import LayerSkipModel, cli
from layerskip.cli import tune as tune_command
from layerskip.data.readers import PROMPTS
from layerskip.tune.tune import TuneConfig, choose_auto

run_module = importlib.import_module("layerskip.tune.tune")  # `layerskip.tune.tune` is a function

FEW = ("--samples", 3, "--max-new-tokens", 8, "--max-draft-tokens", 2, "--exit-layers", "1-2")


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the tiny checkpoint that may be written into."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def tune(own, run):
    def call(*arguments, model=own):
        return run("tune", "--model", model, *FEW, *arguments)

    return call


def always(speedup):
    """A `choose` that finds what it is told to find: tiny models' times are noise."""

    def choose(rows):
        for row in rows[1:]:
            row["speedup"] = speedup
            row["speedup_interval"] = [speedup - 0.1, speedup + 0.1]
        return real_choose(rows)

    real_choose = run_module.choose
    return choose


@pytest.fixture(autouse=True)
def auto_gains_nothing(monkeypatch):
    """Unless a test is about it: what mode auto comes to on tiny models is noise, too."""
    monkeypatch.setattr(run_module, "choose_auto", lambda pairs, rows, lengths: pairs)


def settings_of(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_the_choice_is_written_and_used(tune, own, monkeypatch):
    monkeypatch.setattr(run_module, "choose", always(1.5))
    status, out, err = tune()
    assert (status, err) == (0, "")
    fields = settings_of(own)
    e, d = fields["assistant_early_exit"], fields["num_assistant_tokens"]
    assert e in (1, 2)
    assert d in (1, 2)
    record = fields["layerskip"]["tuning"]
    assert (record["speedup"], record["speedup_interval"]) == (1.5, [1.4, 1.6])
    assert (record["prompts"], record["environment"]["dtype"]) == (3, "float32")
    text = " ".join(out.split())
    assert f"E={e}, d={d} is best here: 1.50x" in text
    assert "predicted speedup over plain decoding" in text
    answer = LayerSkipModel.from_pretrained(own, dtype="float32").generate("abc", max_new_tokens=4)
    assert (answer.mode, answer.exit_layer) == ("self-speculative", e)
    own_settings = settings_of(own)
    assert own_settings["num_assistant_tokens"] == d
    assert [c["exit_layer"] for c in own_settings["layerskip"]["costs"]] == [e]


def test_answers_are_kept_as_a_draft_text_only_where_that_is_asked_for(tune, own):
    assert tune()[0] == 0
    assert "draft_text" not in settings_of(own)["layerskip"]
    assert tune("--keep-draft-text")[0] == 0
    model = LayerSkipModel.from_pretrained(own, dtype="float32")
    text = model.settings.draft_text
    assert text
    assert model.answer("abc").config.datastore == text
    assert tune("--keep-draft-text")[0] == 0  # what is there stays in front
    assert LayerSkipModel.from_pretrained(own).settings.draft_text[: len(text)] == text


def test_where_plain_is_best_it_says_so_and_auto_has_no_exit(tune, own, monkeypatch):
    monkeypatch.setattr(run_module, "choose", always(0.8))
    fields = settings_of(own)
    fields["assistant_early_exit"] = 1  # of an earlier tuning
    (own / "generation_config.json").write_text(json.dumps(fields))
    status, out, _ = tune()
    assert status == 0
    assert "Plain decoding is best here" in " ".join(out.split())
    assert "assistant_early_exit" not in settings_of(own)
    model = LayerSkipModel.from_pretrained(own, dtype="float32")
    assert model.generate("abc", max_new_tokens=4).exit_layer is None


def test_a_dry_run_writes_nothing(tune, own, monkeypatch):
    monkeypatch.setattr(run_module, "choose", always(1.5))
    before = {path: path.read_bytes() for path in own.iterdir()}
    status, out, err = tune("--dry-run", "--keep-draft-text")
    assert status == 0
    assert "--keep-datastore has no effect: nothing is written into a checkpoint" in err
    assert (
        "Nothing was written (--dry-run). As flags: --mode self-speculative --exit-layer"
        in " ".join(out.split())
    )
    assert {path: path.read_bytes() for path in own.iterdir()} == before


def test_json_is_one_document(tune, own, tmp_path):
    output, data = tmp_path / "tuning.json", tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": text}) for text in ("abc", "xy", "q: 1")))
    report = tmp_path / "report"
    status, out, err = tune("--json", "--output", output, "--data", data, "--report", report)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result == json.loads(output.read_text())
    assert result["prompts"] == 3
    assert result["written_to"] == str(own / "generation_config.json")
    assert {p["exit_layer"] for p in result["predictions"]} == {1, 2}
    assert [row["mode"] for row in result["confirmed"]] == ["plain"] + ["self-speculative"] * 3
    assert sorted(result["pictures"]) == sorted(map(str, report.iterdir()))
    assert result["grid"] is None


def test_a_grid_runs_every_pair_of_the_prompts_of_a_seed(tune, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q {n}"}) + "\n" for n in range(40)))
    found = []
    for seed in (0, 0, 1):
        status, out, _ = tune("--grid", "--json", "--dry-run", "--data", data, "--seed", seed)
        assert status == 0
        found.append(json.loads(out))
    pairs = [(row["exit_layer"], row["draft_tokens"]) for row in found[0]["grid"][1:]]
    assert sorted(pairs) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    agreements = [[row["agreement"] for row in result["exits"]] for result in found]
    assert agreements[0] == agreements[1] != agreements[2]


def test_a_gguf_file_gets_its_settings_as_flags(tune, own, tmp_path, monkeypatch):
    """No GGUF file is needed to see it: what is loaded is the folder, what is named is a file."""
    monkeypatch.setattr(run_module, "choose", always(1.5))
    real = tune_command.config_flags.load_model
    monkeypatch.setattr(
        tune_command.config_flags,
        "load_model",
        lambda flags: real(dataclasses.replace(flags, model=str(own))),
    )
    before = settings_of(own)
    status, out, err = tune(model=tmp_path / "model.gguf")
    assert status == 0
    assert err.startswith("layerskip: nothing will be written: settings are kept in a checkpoint f")
    assert err.count("\n") == 1
    text = " ".join(out.split())
    assert "this model is none. As flags: --mode self-speculative --exit-layer" in text
    assert settings_of(own) == before


def test_how_long_it_takes_is_told_before(tune, own, monkeypatch):
    tried = run_module._plain_step_s(LayerSkipModel.from_pretrained(own), ["", "abc"])
    assert tried > 0
    monkeypatch.setattr(run_module, "_plain_step_s", lambda model, prompts: 30.0)
    monkeypatch.setattr(run_module, "FEW_EXITS", 1)
    status, _, err = tune("--dry-run")
    assert status == 0
    assert "a plain step takes 30000 ms here, tuning about " in err
    assert "exits" not in err
    asked = []

    def stopped(model, prompts, config, **_):
        asked.append((config.exit_layers, config.sweeps))
        raise ValueError("seen")

    monkeypatch.setattr(tune_command, "tune", stopped)
    cli.run(["tune", "--model", str(own), "--dry-run"])
    assert asked == [((1,), run_module.FEW_SWEEPS)]


def test_where_n_grams_gain_auto_drafts_from_them_alone(tune, own, monkeypatch):
    def certain(pairs, rows, lengths):
        rows[0].update(speedup=1.4, speedup_interval=[1.2, 1.6])
        return choose_auto(pairs, rows[:1], lengths)

    monkeypatch.setattr(run_module, "choose", always(0.8))
    monkeypatch.setattr(run_module, "choose_auto", certain)
    status, out, _ = tune()
    text = " ".join(out.split())
    assert status == 0
    assert "Mode auto with n-grams is best here: 1.40x" in text
    assert "auto, n-grams" in text
    assert "assistant_early_exit" not in settings_of(own)
    assert "--draft-from n-gram, without the costs" in " ".join(tune("--dry-run")[1].split())


def test_the_file_is_written_before_anything_is_printed(tune, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(tune_command, "_show", full)
    status, _, err = tune("--output", tmp_path / "t.json")
    assert (status, err) == (1, "layerskip: no space left on device\n")
    assert json.loads((tmp_path / "t.json").read_text())["prompts"] == 3


def test_the_seed_draws_from_our_own_prompts_too(folder):
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    drawn = [
        tune_command._prompts(model, TuneConfig(samples=5, seed=seed))[0] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(tune_command._prompts(model, TuneConfig(samples=500))[0]) == len(PROMPTS)


def test_bad_input_is_one_line(tune):
    for flags, status, words in (
        (("--exit-layers", "4"), 1, "exit layers for drafting are 1 to 3 in this model"),
        (("--exit-layers", "2-x"), 2, "is not a list such as 4,8,10-12"),
        (("--data", "no-such-task"), 1, "no file and no task"),
        (("--samples", "1"), 2, "--samples"),
        (("--output", "/no/such/folder/x.json"), 2, "does not exist"),
    ):
        code, out, err = tune(*flags)
        assert (code, out) == (status, "")
        assert err.count("\n") == 1
        assert words in err
