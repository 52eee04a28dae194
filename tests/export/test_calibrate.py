"""Weights rounded to 4 bits with errors that make up for each other."""

import json
import shutil
import warnings

import gguf
import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

import tiny_checkpoint
import tiny_models
from layerskip import cli
from layerskip.decoding import LayerSkipModel
from layerskip.export import calibrate, open_source, to_gguf, to_hf
from layerskip.export.calibrate import gptq
from layerskip.export.gguf_tokenizer import TokenizerWarning
from layerskip.model import load
from layerskip.model.checkpoint import RoundingWarning
from layerskip.model.quantize import quantize

TEXT = "The grid has sixteen points, and every weight has to stand on one of them. " * 60


def inputs(n_in, seed=0):
    """Correlated inputs, as those of a layer are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in // 4, n_in, generator=generator)
    rows = torch.randn(512, n_in // 4, generator=generator) @ mix
    return rows + 0.3 * torch.randn(rows.shape, generator=generator)


@pytest.fixture
def weight():
    return torch.randn(48, 128, generator=torch.manual_seed(1)) * 0.05


def test_outputs_change_less_than_by_nearest_rounding(weight):
    x = inputs(128)
    made = gptq(weight, x.T @ x).dequantize()

    def error(rounded):
        unseen = x[::2] + x[1::2]
        return (unseen @ (rounded - weight).T).norm()

    assert error(made) < 0.6 * error(quantize(weight, 4).dequantize())


def test_rounding_again_gives_back_the_same_numbers(weight):
    weight[0, :32] = 0.25  # equal values
    weight[1] = 0.0
    x = inputs(128)
    x[:, 5] = 0  # an input that is always zero
    made = gptq(weight, x.T @ x).dequantize()
    assert made.isfinite().all()
    torch.testing.assert_close(quantize(made, 4).dequantize(), made, rtol=0, atol=1e-8)
    again = quantize(quantize(made, 4).dequantize(), 4)
    assert torch.equal(again.codes(), quantize(made, 4).codes())


def test_without_correlation_it_is_nearest_rounding(weight):
    made = gptq(weight, torch.eye(128)).dequantize()
    torch.testing.assert_close(made, quantize(weight, 4).dequantize(), rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def calibrated(folder):
    source = open_source(folder)
    return source, calibrate(source, source.files.tokenizer().encode(TEXT))


def test_every_matrix_of_a_layer_is_on_the_grid_and_nothing_else_changes(calibrated, tmp_path):
    source, made = calibrated
    written = to_hf(source, tmp_path / "out", calibrated=made)
    assert written.nll_change == made.rounding.nll_change
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        before = source.files.tensors.read(name)
        if ".layers." in name and tensor.ndim == 2:
            assert not torch.equal(tensor, before)
            nearest = quantize(tensor, 4).dequantize()
            torch.testing.assert_close(nearest, tensor, rtol=0, atol=1e-7)
        else:
            assert torch.equal(tensor, before)


def test_loaded_in_4_bits_it_is_the_checkpoint_that_was_written(calibrated, theirs, tmp_path):
    source, made = calibrated
    to_hf(source, tmp_path / "out", calibrated=made)
    tokens = torch.arange(3, 40)
    decoder = load(tmp_path / "out", dtype=torch.float32, weights="int4").decoder
    cache = decoder.new_cache(64)
    hidden = decoder.run(decoder.embed(tokens[None]), 0, len(decoder.layers), cache)
    # Embedding and head are rounded to 8 bits at load; put there, the rest has to be the same.
    state = load_file(tmp_path / "out" / "model.safetensors")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            model.get_parameter(name).copy_(quantize(state[name], 8).dequantize())
        expected = model(tokens[None], use_cache=False).logits
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=1e-4)


def test_llama_cpp_s_kind_of_4_bits_keeps_it(calibrated, tmp_path):
    source, made = calibrated
    to_hf(source, tmp_path / "out", calibrated=made)
    name = "model.layers.1.mlp.down_proj.weight"
    file = tmp_path / "out.gguf"
    (tmp_path / "out" / "tokenizer.json").unlink()  # llama.cpp has no name for this tokenizer
    to_gguf(open_source(tmp_path / "out"), file, weights="q4_1")
    tensors = open_source(file).files.tensors
    torch.testing.assert_close(
        tensors.read(name), made.tensors[name].dequantize(), rtol=0, atol=1e-6
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = quantize(source.files.tensors.read(name), 8).dequantize()  # as int4 has them
        assert tensors.stored_as(name) == "Q8_0"
        # A step of 8 bits: gguf divides by a scale that is not rounded yet.
        torch.testing.assert_close(tensors.read(name), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_centred_grid_compensates_errors_too(weight, kind):
    x = inputs(128)
    made = gptq(weight, x.T @ x, kind)
    assert made.kind == kind
    nearest = gptq(weight, torch.eye(128), kind)

    def error(rounded):
        return ((x[::2] + x[1::2]) @ (rounded.dequantize() - weight).T).norm()

    assert error(made) < 0.6 * error(nearest)


@pytest.mark.parametrize("case", ["llama2", "qwen2-tied"])
def test_a_gguf_file_has_the_calibrated_blocks(case, tmp_path):
    """Embedding and head included, in the row order of the family; loaded as stored."""
    tiny_models.build(case, head_dim=16).save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    tokens = tiny_models.token_ids(case, 1, 2600)[0].tolist()
    made = calibrate(source, tokens, kind=Kind.Q4_0, embedding=Kind.Q4_1)
    with warnings.catch_warnings(action="ignore", category=TokenizerWarning):
        written = to_gguf(
            source, tmp_path / "m.gguf", weights="q4_0", embedding="q4_1", calibrated=made
        )
    assert written.nll_change == made.rounding.nll_change
    assert set(written.stored_as) == {"Q4_0", "Q4_1", "F32"}
    file = open_source(tmp_path / "m.gguf")
    for name, weight in made.tensors.items():
        assert file.files.tensors.stored_as(name) == weight.kind.name
        assert torch.equal(file.read(name), weight.dequantize())
    decoder = load(tmp_path / "m.gguf", dtype=torch.float32, weights="stored").decoder
    expected = made.tensors["model.embed_tokens.weight"].dequantize()
    assert torch.equal(decoder.embedding.weight.dequantize(), expected)


def test_what_it_costs_is_measured_on_other_windows(folder, calibrated, tmp_path):
    source, made = calibrated
    assert made.rounding.method == "calibration"
    tokens = source.files.tokenizer().encode(TEXT)
    to_hf(source, tmp_path / "out", calibrated=made)
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (folder, tmp_path / "out")
    )
    size = before.config.max_position_embeddings
    count = min(len(tokens) // min(size, 512), 40)
    windows = torch.tensor(tokens[: count * min(size, 512)]).view(count, -1)[4::5]
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            parameter = after.get_parameter(name)
            parameter.copy_(quantize(parameter, 8).dequantize())
        changed, plain = (model(windows, labels=windows).loss.item() for model in (after, before))
    assert made.rounding.nll_change == pytest.approx(changed / plain - 1, abs=1e-4)


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["export", "--model", str(folder), "--to", "hf", "--weights", "int4"]
    out = tmp_path / "out"
    assert cli.run([*arguments, "--calibrate", str(text), str(out)]) == 0
    assert "with --weights int4: " in capsys.readouterr().out
    monkeypatch.setattr(
        "layerskip.cli.export.calibrate", None
    )  # what is in the way is said before it begins
    assert cli.run([*arguments, "--calibrate", str(text), str(out)]) == 1
    assert "out exists; choose another name or say --overwrite" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        little = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr("shutil.disk_usage", lambda folder: little)
        assert cli.run([*arguments, "--calibrate", str(text), str(tmp_path / "other")]) == 1
    assert "has 0.00 GB free; free some space" in capsys.readouterr().err
    fields = json.loads((out / "generation_config.json").read_text())
    assert fields["layerskip"]["weights"]["int4"]["method"] == "calibration"
    # Cast to 16 bits, its weights are off the grid: what was measured is not said of them.
    cast = ["export", "--model", str(out), "--to", "hf", "--weights", "bf16", str(tmp_path / "b")]
    assert cli.run(cast) == 0
    assert "layerskip" not in json.loads((tmp_path / "b" / "generation_config.json").read_text())


def test_usage_errors(folder, capsys):
    for arguments, message in (
        (["--to", "hf", "--weights", "int4"], "go together"),
        (["--to", "hf", "--calibrate", "text.txt"], "go together"),
        (["--to", "gguf", "--weights", "int4", "--calibrate", "t"], "goes with --to hf"),
        (["--to", "gguf", "--weights", "q8_0", "--calibrate", "t"], "q4_0 or q4_1 go together"),
        (["--to", "hf", "--embedding", "q4_0"], "goes with --to gguf"),
    ):
        assert cli.run(["export", "--model", str(folder), *arguments, "out"]) == 2
        assert message in capsys.readouterr().err


def test_a_short_text_is_refused(folder):
    with pytest.raises(ValueError, match="has 100 tokens; 2560 are needed"):
        calibrate(open_source(folder), list(range(100)))


def doubts(path, weights):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        LayerSkipModel.from_pretrained(path, dtype="float32", weights=weights)
    return [str(w.message) for w in seen if w.category is RoundingWarning]


def test_loading_says_what_is_not_known_or_is_much(folder, tmp_path):
    tiny_checkpoint.save(tmp_path)
    assert doubts(tmp_path, "16bit") == doubts(tmp_path, "int8") == []
    (unknown,) = doubts(tmp_path, "int4")
    assert "--calibrate TEXT" in unknown
    file = tmp_path / "generation_config.json"
    fields = json.loads(file.read_text())

    def known(change):
        known = {"method": "calibration", "nll_change": change}
        file.write_text(json.dumps({**fields, "layerskip": {"weights": {"int4": known}}}))
        return doubts(tmp_path, "int4")

    assert known(0.03) == known(None) == []
    (much,) = known(0.071)
    assert much.startswith("int4 costs this checkpoint 7%")
    assert len(known(float("nan"))) == 1
    assert "\n" not in much + unknown


@pytest.mark.parametrize(
    ("kind", "kinds", "is_doubted"),
    [
        ("Q4_1", {}, False),
        ("Q4_1", {"blk.1.ffn_down.weight": "Q8_0"}, True),
    ],
)
def test_of_gguf_files_those_are_doubted_that_are_rounded(tmp_path, kind, kinds, is_doubted):
    one, *rest = (gguf.GGMLQuantizationType[name] for name in (kind, *kinds.values()))
    kinds = dict(zip(kinds, rest, strict=True))
    gguf_files.write(tmp_path / "m.gguf", tiny_models.build("llama2"), kind=one, kinds=kinds)
    assert doubts(tmp_path, "16bit") == doubts(tmp_path, "int8") == []
    for path in (tmp_path, tmp_path / "m.gguf"):
        assert ["--calibrate TEXT" in line for line in doubts(path, "int4")] == [True] * is_doubted
