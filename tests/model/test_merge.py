"""A base and a weight delta of 2 bits make a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import weight_deltas
from layerskip import LayerSkipModel
from layerskip.model.hub import LEVELS, decode, merge


@pytest.mark.parametrize("width", [1, 48, 63, 64, 65, 101, 640])  # with and without shorter blocks
def test_levels_come_back_as_they_were(width):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(4, (40, width), generator=generator)
    scales = 2.0 ** torch.randint(-12, 3, (40, -(-width // 64)), generator=generator)
    packed = torch.zeros(40, -(-width // 4), dtype=torch.uint8)
    for column in range(width):
        packed[:, column // 4] |= (codes[:, column] << 2 * (column % 4)).byte()
    expected = torch.tensor(LEVELS)[codes] * scales.repeat_interleave(64, dim=1)[:, :width]
    assert torch.equal(decode(packed, scales.half(), width), expected)


def merged(tmp_path, case):
    weight_deltas.base(tmp_path / "base", case)
    weight_deltas.trained(tmp_path / "base", tmp_path / "trained")
    weight_deltas.write(tmp_path / "x.safetensors", tmp_path / "base", tmp_path / "trained")
    merge(tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "base")
    return tmp_path / "out"


def check_near_the_trained(before, after, found):
    assert found.keys() == after.keys()
    for name in found:
        change = after[name] - before[name]
        error = (found[name] - after[name]).norm() / change.norm()
        assert error < (0.42 if change.ndim == 2 else 0.15), name


@pytest.mark.parametrize("case", ["smollm2", "llama2", "qwen2"])  # tied head, own head, biases
def test_merged_weights_are_near_the_trained_ones(case, tmp_path):
    found = weight_deltas.weights(merged(tmp_path, case))
    before, after = (weight_deltas.weights(tmp_path / name) for name in ("base", "trained"))
    check_near_the_trained(before, after, found)


def test_a_gguf_file_as_the_base(tmp_path):
    """Its rows of Q and K lie in another order, and its tokenizer is inside."""
    weight_deltas.gguf_base(tmp_path / "base.gguf", tmp_path / "plain")
    weight_deltas.trained(tmp_path / "plain", tmp_path / "trained")
    weight_deltas.write(tmp_path / "x.safetensors", tmp_path / "plain", tmp_path / "trained")
    merge(tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "base.gguf")
    check_near_the_trained(
        *(weight_deltas.weights(tmp_path / name) for name in ("plain", "trained", "out"))
    )
    assert LayerSkipModel.from_pretrained(tmp_path / "out").tokenizer is not None


def test_a_merged_folder_is_an_ordinary_checkpoint(tmp_path):
    out = merged(tmp_path, "smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert set(load_file(out / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )
    ours = LayerSkipModel.from_pretrained(out, dtype="float32")
    prompt = ours.tokenizer("Hello", return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    # With the settings that came along transformers drafts by early exit too.
    answer = theirs.float().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    found = ours.generate("Hello", mode="self-speculative", max_new_tokens=12)
    assert found.token_ids == answer[0, prompt.shape[1] :].tolist()
    assert (found.exit_layer, found.draft_tokens) == (2, 3)
    assert ours.settings.draft_vocabulary == (5, 6, 7, 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
