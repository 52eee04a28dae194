"""A difference whose rounding errors make up for each other on a text."""

import pytest
import torch
from test_calibrate import inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

import differences
from layerskip import cli, merge
from layerskip.export import open_source, to_difference
from layerskip.export.compensate import compensated, two_bits
from layerskip.model.difference import BLOCK, decode, encode

TEXT = "What training changed is little, and most of it can be said in two bits a weight. " * 60


@pytest.fixture(params=[128, 100, 192])
def change(request):
    return torch.randn(48, request.param, generator=torch.manual_seed(1)) * 0.01


def in_two_bits(change, x):
    return compensated(change, x.T @ x, two_bits, BLOCK)


def test_outputs_change_less_than_by_nearest_levels(change):
    n_in = change.shape[1]
    x = inputs(n_in)
    made, nearest = in_two_bits(change, x), decode(*encode(change), n_in)

    def error(rounded):
        unseen = x[::2] + x[1::2]
        return (unseen @ (rounded - change).T).norm()

    assert error(made) < 0.8 * error(nearest)


def test_the_file_says_the_numbers_that_were_chosen(change):
    made = in_two_bits(change, inputs(change.shape[1]))
    torch.testing.assert_close(decode(*encode(made), change.shape[1]), made, rtol=2e-3, atol=0.0)


def test_what_did_not_change_stays_so(change):
    change[:, :64] = 0.0
    change[3] = 0.0
    made = in_two_bits(change, torch.eye(change.shape[1]))
    assert not made[:, :64].any()
    assert not made[3].any()


def test_without_correlation_it_is_the_nearest_level(change):
    made = in_two_bits(change, torch.eye(change.shape[1]))
    nearest = decode(*encode(change), change.shape[1])
    torch.testing.assert_close(made, nearest, rtol=0, atol=1e-7)


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
