"""Runs of adapter training on a tiny model: result, resume, files and refusals."""

import dataclasses
import json

import pytest
import torch

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.adapt import AdaptConfig, adapt, train
from layerskip.adapt.texts import load_texts
from layerskip.decoding.exit_adapter import draft_head
from layerskip.fileio import CheckpointError, read_json
from layerskip.model.exit_adapter import load_adapter, read_adapter

SMALL = {
    "round_tokens": 400,
    "max_new_tokens": 24,
    "max_length": 48,
    "batch_tokens": 256,
    "eval_prompts": 4,
    "draft_vocabulary": 200,
    "exit_layer": 1,
    "learning_rate": 5e-3,  # of a few steps
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Count to {n}."} for n in range(40)]
    rows += [{"text": f"{n} is a number, and {n + 1} is the next one. " * 3} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


class Clock:
    """Time that passes by a second whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(train, "time", Clock())


def config_of(folder, data, **changes):
    return AdaptConfig(output=folder, data=(data,), max_minutes=2.0, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", Clock())
        reports = []
        config = config_of(tmp_path_factory.mktemp("run"), data)
        return config, adapt(base, config, reports.append, dtype="float32"), reports


def test_training_writes_an_adapter_that_agrees_more_and_more(trained):
    config, result, reports = trained
    assert result.path == config.output / "exit_adapter.safetensors"
    first, *_, last = result.history
    assert last["accepted"] > first["accepted"]
    best = max(result.history, key=lambda e: e["accepted"])  # before it was rounded for the file
    assert result.agreement.by_depth[0] == pytest.approx(best["by_depth"][0], abs=0.03)
    _, settings, _ = read_adapter(result.path)
    assert settings.acceptance == result.agreement.by_confidence
    assert sum(settings.acceptance.verified) >= result.agreement.tokens
    assert result.passes > result.tokens > 0
    assert {"training", "evaluated", "writing answers"} <= {r.activity for r in reports}
    assert any(r.loss is not None for r in reports)
    assert reports[0].answers_per_prompt == 0
    assert reports[-1].answers_per_prompt == 32 / 36  # one batch of those that are not held out


def test_a_run_ends_with_the_speed_of_each_source_and_a_card(trained, base):
    config, result, _ = trained
    assert [speed.source for speed in result.speeds] == [
        "n-gram",
        "exit-adapter",
        "exit-adapter+n-gram",
    ]
    assert all(s.predicted > 0 and s.measured > 0 for s in result.speeds)
    assert all(s.accepted_length >= 1 for s in result.speeds)
    card = (config.output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert f"# Exit adapter of {base.name}\n" in card
    assert str(base.parent) not in card
    assert "base_model_relation: adapter" in card
    assert "| exit-adapter+n-gram |" in card
    assert "| `draft_vocabulary` | 200 |" in card


@pytest.mark.usefixtures("compiled_kernels")
def test_an_adapter_takes_8_bits_where_these_are_fast(trained, base):
    _, result, _ = trained

    def adapter_of(**options):
        model = LayerSkipModel.from_pretrained(base, adapter=result.path, **options)
        assert model.adapter is not None
        return model.adapter

    in_16_bits, in_8_bits = adapter_of(compile=False), adapter_of(compile=True)
    assert in_16_bits.decoder.weights == "16bit"
    assert in_8_bits.decoder.weights == "int8"
    assert in_8_bits.weight_bytes < 0.7 * in_16_bits.weight_bytes
    heads = [draft_head(adapter).decoder.head_bytes for adapter in (in_8_bits, in_16_bits)]
    assert heads[0] < 0.7 * heads[1]
    decoder = LayerSkipModel.from_pretrained(base, compile=False).decoder
    decoder.weights = "stored"  # as if its matrices were those of a quantized GGUF file
    assert load_adapter(result.path, decoder, base).decoder.weights == "int8"


def test_the_adapter_drafts_and_answers_stay_the_same(trained, base):
    _, result, _ = trained
    model = LayerSkipModel.from_pretrained(base, dtype="float32", adapter=result.path)
    plain = model.generate("Count to 7.", mode="plain", max_new_tokens=40)
    drafted = model.generate(
        "Count to 7.", mode="self-speculative", draft_from="exit-adapter", max_new_tokens=40
    )
    assert drafted.token_ids == plain.token_ids
    assert drafted.accepted > 0
    auto = model.resolve()
    assert auto.draft_from == "exit-adapter+n-gram"
    assert model.generate("Count to 7.", max_new_tokens=40).token_ids == plain.token_ids


def test_an_adapter_beside_the_checkpoint_is_found(trained, base, tmp_path):
    _, result, _ = trained
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / result.path.name).write_bytes(result.path.read_bytes())
    assert LayerSkipModel.from_pretrained(tmp_path, dtype="float32").adapter is not None
    without = LayerSkipModel.from_pretrained(tmp_path, dtype="float32", adapter="none")
    assert without.adapter is None
    assert without.resolve().draft_from == "n-gram"


def test_an_adapter_of_another_model_is_refused(trained, base, tmp_path):
    _, result, _ = trained
    other = tiny_checkpoint.save(tmp_path / "other")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    name = "model.layers.3.self_attn.o_proj.weight"
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"of another model than .*its weights differ"):
        LayerSkipModel.from_pretrained(other, dtype="float32", adapter=result.path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{not json at all}", b"x" * 99])
def test_a_damaged_adapter_is_refused_in_one_line(base, tmp_path, content):
    file = tmp_path / "exit_adapter.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"exit_adapter\.safetensors"):
        LayerSkipModel.from_pretrained(base, dtype="float32", adapter=file)


def test_a_run_is_resumed_where_it_was_interrupted(base, data, tmp_path):
    whole, cut = config_of(tmp_path / "whole", data), config_of(tmp_path / "cut", data)
    whole, cut = (dataclasses.replace(c, save_minutes=0.05, epochs=8.0) for c in (whole, cut))
    adapt(base, whole, dtype="float32")

    def interrupt(progress):
        if progress.activity == "training" and progress.passes > 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(base, cut, interrupt, dtype="float32")
    before = read_json(cut.output / "state.json")
    assert 0 < before["passes"] <= 2000
    with pytest.raises(ValueError, match="--resume"):
        adapt(base, cut, dtype="float32")
    result = adapt(base, dataclasses.replace(cut, resume=True), dtype="float32")
    assert result.passes > before["passes"]
    assert result.history[0]["minutes"] < before["seconds"] / 60
    assert result.agreement.by_depth[0] > 0.05


def test_a_resumed_run_trains_as_one_that_was_never_interrupted(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train._Run, "_rate", lambda self: 1.0)  # which goes by the time
    configs = [
        config_of(tmp_path / name, data, save_minutes=1e-9, epochs=2.0) for name in ("a", "b")
    ]
    ends = []
    for config, stops in zip(configs, ([9], [4, 9]), strict=True):
        for stop in stops:

            def interrupt(progress, stop=stop, config=config):
                state = config.output / "state.json"
                if state.is_file() and read_json(state)["steps"] == stop:
                    raise KeyboardInterrupt

            resumed = dataclasses.replace(config, resume=True)
            with pytest.raises(KeyboardInterrupt):
                adapt(base, resumed, interrupt, dtype="float32")
        ends.append((config.output / "state.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_early_stopping_ends_a_run(base, data, tmp_path):
    config = config_of(tmp_path, data, patience=1, learning_rate=1e-12)
    result = adapt(base, dataclasses.replace(config, max_minutes=1000.0), dtype="float32")
    assert len(result.history) == 2


def test_an_exit_layer_beyond_the_model_is_refused(base, data, tmp_path):
    with pytest.raises(ValueError, match="exit layer 4 is out of range"):
        adapt(base, config_of(tmp_path, data, exit_layer=4), dtype="float32")


def test_an_output_that_is_no_folder_is_refused(base, data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        with pytest.raises(ValueError, match=f"{name} cannot be made as a folder"):
            adapt(base, config_of(tmp_path / name, data))


def test_a_single_prompt_is_refused(base, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "Count to 3."}\n')
    with pytest.raises(ValueError, match="give two or more"):
        adapt(base, config_of(tmp_path / "run", str(tmp_path / "one.jsonl")))


def test_long_prompts_and_texts_are_cut_before_they_are_tokenized(tmp_path):
    rows = [{"prompt": "word " * 1000 + "end"}, {"prompt": "short"}, {"text": "text " * 100}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, texts = load_texts((str(tmp_path / "rows.jsonl"),), 0, 100)
    assert sorted(map(len, prompts)) == [5, 100]
    assert any(prompt.endswith(" end") for prompt in prompts)
    assert {len(text) for text in texts} == {100}


def test_the_time_bounds_a_round_of_data(base, data, tmp_path):
    config = dataclasses.replace(config_of(tmp_path, data, round_tokens=10**7), max_minutes=1.0)
    assert adapt(base, config, dtype="float32").tokens < 10**5
