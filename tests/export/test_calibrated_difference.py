"""A difference whose rounding errors make up for each other on a text."""

import pytest
import torch
from test_calibrate import inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

import differences
from layerskip import cli, merge
from layerskip.export import open_source, to_difference
from layerskip.export.calibrate import _of_exits
from layerskip.export.gptq import compensated, levels_of
from layerskip.model.files.difference import BLOCK, decode, encode

TEXT = "What training changed is little, and most of it can be said in two bits a weight. " * 60


@pytest.fixture(params=[1, 2])
def bits(request):
    return request.param


@pytest.fixture(params=[128, 100, 192])
def change(request):
    return torch.randn(48, request.param, generator=torch.manual_seed(1)) * 0.01


def by_inputs(change, x, bits):
    return compensated(change, x.T @ x, levels_of(bits), BLOCK)


def by_itself(change, bits):
    return decode(*encode(change, bits), change.shape[1], bits)


def test_outputs_change_less_than_by_nearest_levels(change, bits):
    n_in = change.shape[1]
    x = inputs(n_in)
    made, nearest = by_inputs(change, x, bits), by_itself(change, bits)

    def error(rounded):
        unseen = x[::2] + x[1::2]
        return (unseen @ (rounded - change).T).norm()

    assert error(made) < 0.8 * error(nearest)


def test_the_file_says_the_numbers_that_were_chosen(change, bits):
    made = by_inputs(change, inputs(change.shape[1]), bits)
    torch.testing.assert_close(by_itself(made, bits), made, rtol=2e-3, atol=0.0)


def test_what_did_not_change_stays_so(change, bits):
    change[:, :64] = 0.0
    change[3] = 0.0
    made = by_inputs(change, torch.eye(change.shape[1]), bits)
    assert not made[:, :64].any()
    assert not made[3].any()


def test_without_correlation_it_is_the_nearest_level(change, bits):
    made = by_inputs(change, torch.eye(change.shape[1]), bits)
    nearest = by_itself(change, bits)
    torch.testing.assert_close(made, nearest, rtol=0, atol=1e-7)


@pytest.mark.parametrize("exit_layer", [None, 2, 4])
def test_the_head_sees_what_leaves_its_exit_and_the_last_layer(exit_layer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        differences.base(tmp_path / "base", "llama2"), dtype=torch.float32
    )
    windows = torch.arange(3, 43).view(2, 20)
    left = []
    with torch.no_grad():
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out: left.append(out))
        model(windows)
        hidden = [out if torch.is_tensor(out) else out[0] for out in left]
        seen = [model.model.norm(hidden[-1])]
        seen += [model.model.norm(hidden[exit_layer - 1])] if exit_layer == 2 else []
        expected = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in seen)
        found = _of_exits(model, windows, exit_layer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("case", "at_most"),
    [
        ("llama2", 0.8),
        ("smollm2", 1.0),  # its head is the embedding, whose random rows leave little to choose
    ],
)
def test_the_merged_model_is_nearer_to_the_trained_one(case, at_most, tmp_path, capsys):
    base = differences.base(tmp_path / "base", case)
    trained = differences.trained(base, tmp_path / "trained")
    AutoTokenizer.from_pretrained(base).save_pretrained(trained)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["export", "--model", str(trained), "--to", "difference", "--base", str(base)]
    assert cli.run([*command, "--calibrate", str(text), str(tmp_path / "by-text.safetensors")]) == 0
    assert "relative error of the difference" in capsys.readouterr().out
    to_difference(open_source(trained), tmp_path / "nearest.safetensors", base=str(base))

    tokens = torch.tensor([AutoTokenizer.from_pretrained(trained).encode(TEXT)[:512]])
    wanted = logits(trained, tokens)
    errors = {}
    for name in ("by-text", "nearest"):
        merge(tmp_path / f"{name}.safetensors", tmp_path / name, base=base)
        errors[name] = (logits(tmp_path / name, tokens) - wanted).norm()
    assert errors["by-text"] < at_most * errors["nearest"]
