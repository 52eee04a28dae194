"""CheckpointSettings written into a checkpoint and read back, by this package and by transformers."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny_models
from layerskip import LayerSkipModel
from layerskip.model import StepCosts
from layerskip.model.checkpoint import SettingsWarning, read_settings
from layerskip.model.hardware import machine
from layerskip.tune.tune import Choice, check_writable, write_settings

CHOICE = Choice(
    mode="self-speculative",
    exit_layer=2,
    draft_tokens=3,
    tokens_per_s=80.0,
    speedup=1.6,
    speedup_interval=[1.5, 1.7],
    reason="so it is",
)
PLAIN = Choice(
    mode="plain",
    exit_layer=None,
    draft_tokens=None,
    tokens_per_s=50.0,
    speedup=1.0,
    speedup_interval=[1.0, 1.0],
    reason="plain",
)
RECORD = {"speedup": 1.6, "prompts": 20}


@pytest.fixture
def folder(tmp_path):
    tiny_models.reference("llama2").save_pretrained(tmp_path)
    return tmp_path


def fields_of(folder):
    return json.loads((folder / "generation_config.json").read_text())


def write(folder, choice=CHOICE, record=RECORD):
    return write_settings(folder, choice, end_tokens=[2], record=record)


def test_this_package_and_transformers_read_them_back(folder):
    before = fields_of(folder)
    assert write(folder) == folder / "generation_config.json"
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    answer = model.generate([5, 6, 7], max_new_tokens=4)
    assert (answer.mode, answer.exit_layer) == ("self-speculative", 2)
    assert (model.settings.exit_layer, model.settings.draft_tokens) == (2, 3)
    theirs = GenerationConfig.from_pretrained(folder)
    assert (theirs.assistant_early_exit, theirs.num_assistant_tokens) == (2, 3)
    assert theirs.layerskip == {"tuning": RECORD}
    assert before.pop("_from_model_config")  # a mark that makes transformers pass over other keys
    assert fields_of(folder).items() >= before.items()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2


def test_where_transformers_cannot_draft_the_exit_is_ours(tmp_path):
    """transformers runs all layers of GPT-NeoX, behind a cache for E."""
    tiny_models.reference("gpt-neox").save_pretrained(tmp_path)
    write(tmp_path)
    assert "assistant_early_exit" not in fields_of(tmp_path)
    assert fields_of(tmp_path)["layerskip"] == {"exit_layer": 2, "tuning": RECORD}
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32")
    assert (model.settings.exit_layer, model.settings.draft_tokens) == (2, 3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).numel()
    write(tmp_path, PLAIN, {"mode": "plain"})
    assert read_settings(tmp_path, {}, vocab_size=99).exit_layer is None


def test_plain_removes_the_fields_that_would_say_otherwise(folder):
    write(folder)
    write(folder, PLAIN, {"mode": "plain"})
    fields = fields_of(folder)
    assert not {"assistant_early_exit", "num_assistant_tokens"} & set(fields)
    assert fields["layerskip"] == {"tuning": {"mode": "plain"}}
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    assert model.generate([5, 6, 7], max_new_tokens=4).exit_layer is None  # n-grams alone


def test_what_else_stands_there_stays(folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 3], "layerskip": {"other": 1}, "top_k": 7}))
    write(folder)
    fields = fields_of(folder)
    assert (fields["eos_token_id"], fields["top_k"]) == ([2, 3], 7)
    assert fields["layerskip"] == {"other": 1, "tuning": RECORD}


def costs(weights, head, threads=0):
    return StepCosts(
        dtype="float32",
        weights=weights,
        device="cpu",
        kernels="pytorch",
        exit_layer=1,
        draft_step=0.5,
        draft_tokens_scored=9,
        head=head,
        passes=(1.0,),
        overhead=0.0,
        threads=threads,
        machine="here",
    )


def test_plain_for_one_kind_of_weights_leaves_the_exit_to_others(folder):
    plain = {"end_tokens": [2], "record": {"mode": "plain"}}
    write_settings(folder, CHOICE, end_tokens=[2], record=RECORD, costs=costs("16bit", 0.1))
    before = fields_of(folder)
    write_settings(folder, PLAIN, **plain, costs=costs("int8", 0.1))
    assert fields_of(folder)["assistant_early_exit"] == before["assistant_early_exit"]
    assert fields_of(folder)["num_assistant_tokens"] == before["num_assistant_tokens"]
    (folder / "generation_config.json").write_text(json.dumps(before))
    write_settings(folder, PLAIN, **plain, costs=costs("16bit", 0.1))
    assert "assistant_early_exit" not in fields_of(folder)


def test_each_kind_of_weights_keeps_the_costs_it_was_tuned_with(folder):
    def written(*each):
        for found in each:
            write_settings(folder, CHOICE, end_tokens=[2], record=RECORD, costs=found)

    written(costs("16bit", 0.1), costs("int8", 0.2), costs("16bit", 0.3))
    settings = read_settings(folder, {}, vocab_size=99)
    for weights, head in (("16bit", 0.3), ("int8", 0.2), ("int4", None)):
        measured = settings.measured_for("float32", weights, "cpu", "pytorch", "here").measured
        assert (measured.head if measured else None) == head
    written(costs("16bit", 0.4, threads=2), costs("16bit", 0.5, threads=1))
    settings = read_settings(folder, {}, vocab_size=99)
    for weights, threads, head in (("16bit", 2, 0.4), ("16bit", 1, 0.5), ("16bit", 4, None)):
        kind = ("float32", weights, "cpu", "pytorch", "here")
        measured = settings.measured_for(*kind, threads=threads).measured
        assert (measured.head if measured else None) == head


def test_costs_of_this_machine_reach_mode_auto(folder):
    here = dataclasses.replace(
        costs("16bit", 0.3, torch.get_num_threads()), machine=machine(torch.device("cpu"))
    )
    for one in (dataclasses.replace(here, machine="elsewhere", head=0.9), here):
        write_settings(folder, CHOICE, end_tokens=[2], record=RECORD, costs=one)
    model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    assert [found.head for found in model.settings.costs] == [0.3]


def test_a_new_file_knows_the_special_tokens(folder):
    """Without a file transformers takes them from config.json, with one only from there."""
    (folder / "generation_config.json").unlink()
    write(folder)
    theirs = GenerationConfig.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert LayerSkipModel.from_pretrained(folder, dtype="float32").end_tokens == {2}


def test_a_failure_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    old = (folder / "generation_config.json").read_text()
    names = sorted(path.name for path in folder.iterdir())

    def fail(source, target):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be written: the disk"):
        write(folder)
    assert (folder / "generation_config.json").read_text() == old
    assert sorted(path.name for path in folder.iterdir()) == names


def test_what_cannot_be_written_is_refused_before(folder, monkeypatch):
    check_writable(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        check_writable(folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--dry-run"):
        check_writable(folder)


def test_costs_are_numbers_above_0():
    for number in (float("nan"), float("inf"), 0.0, -1.0):
        good = costs("16bit", 0.1)
        assert StepCosts.from_dict(good.to_dict()) == good
        for field in ("head", "draft_step"):
            with pytest.raises(ValueError, match="above 0"):
                StepCosts.from_dict(good.to_dict() | {field: number})
        with pytest.raises(ValueError, match="above 0"):
            StepCosts.from_dict(good.to_dict() | {"passes": f"1.0 {number}"})


def test_what_only_transformers_would_heed_is_named(folder):
    file = folder / "generation_config.json"
    escape_control_chars = {"repetition_penalty": 1.0, "bad_words_ids": None, "suppress_tokens": []}
    file.write_text(
        json.dumps({"eos_token_id": 2, "temperature": 0.7, "top_p": 0.9, **escape_control_chars})
    )
    read_settings(folder, {}, vocab_size=99)
    file.write_text(
        json.dumps({**escape_control_chars, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3})
    )
    with pytest.warns(
        SettingsWarning,
        match=r"names repetition_penalty 1.1, no_repeat_ngram_size 3, which transformers .* does not"
        r" \(--repetition-penalty applies that\)",
    ):
        read_settings(folder, {}, vocab_size=99)


def test_a_link_out_of_the_folder_is_not_written_through(folder, tmp_path_factory):
    own = tmp_path_factory.mktemp("home") / "profile"
    own.write_text("{}")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(own)
    for call in (check_writable, write):
        with pytest.raises(ValueError, match="outside of its folder"):
            call(folder)
    assert own.read_text() == "{}"
    (folder / "generation_config.json").unlink()
    (folder / "inside.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(folder / "inside.json")
    write(folder)
    assert json.loads((folder / "inside.json").read_text())["assistant_early_exit"] == 2


def test_who_may_read_a_file_stays(folder):
    file = folder / "generation_config.json"
    file.write_text("{}")
    file.chmod(0o600)
    write(folder)
    assert file.stat().st_mode & 0o777 == 0o600
