"""Checkpoints as transformers saves them: one file, several with an index, tied and untied head."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerskip.model import load
from tiny_models import LAYERS, reference, reference_logits, token_ids

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # float32


def check(case, folder):
    """The logits of a checkpoint folder equal those of the model that it was saved from."""
    decoder = load(folder, dtype=torch.float32).decoder
    tokens = token_ids(case, 1, 20)
    found = decoder.logits(decoder.run(decoder.embed(tokens), 0, LAYERS, decoder.new_cache(20)))
    expected = reference_logits(reference(case), tokens)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    return decoder


@pytest.mark.parametrize(
    ("case", "shard_size"), [("llama2", "20KB"), ("llama3.2", "20KB"), ("gpt-neox", "5GB")]
)
def test_logits_equal_whatever_the_files(case, shard_size, tmp_path):
    reference(case).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5 or shard_size == "5GB"
    decoder = check(case, tmp_path)
    tied = reference(case).config.tie_word_embeddings
    assert (decoder.head.weight is decoder.embedding.weight) == tied


def test_head_that_a_tied_checkpoint_repeats_is_in_memory_once(tmp_path):
    reference("llama3.2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert check("llama3.2", tmp_path).tied


@pytest.mark.parametrize(
    ("case", "stored", "known_as"),
    [
        ("llama3.2", "model.embed_tokens.weight", "lm_head.weight"),  # either stands for both
        ("gpt-neox", "embed_out.weight", "lm_head.weight"),  # its name in memory
    ],
)
def test_other_names_that_transformers_reads(case, stored, known_as, tmp_path):
    reference(case).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[known_as] = tensors.pop(stored)
    save_file(tensors, file, metadata={"format": "pt"})
    check(case, tmp_path)


def test_old_buffers_of_rotary_frequencies_are_skipped(tmp_path):
    reference("llama2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | buffer, file, metadata={"format": "pt"})
    check("llama2", tmp_path)


@pytest.mark.parametrize(
    ("case", "old"),
    [
        ("llama2", {"rope_theta": 10_000.0, "rope_scaling": None}),
        (
            "llama-linear",
            {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "llama3.1",
            {
                "rope_theta": 1000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
    ],
)
def test_configs_of_older_transformers_are_understood(case, old, tmp_path):
    reference(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    check(case, tmp_path)


def test_settings_travel_in_generation_config(tmp_path):
    reference("llama2").save_pretrained(tmp_path)
    fields = {"eos_token_id": [2, 7], "assistant_early_exit": 2, "num_assistant_tokens": 6}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    settings = load(tmp_path, dtype=torch.float32).settings
    assert settings.end_tokens == (2, 7)
    assert (settings.exit_layer, settings.draft_tokens) == (2, 6)


@pytest.mark.parametrize("file", ["removed", "{}"])
def test_end_token_falls_back_on_the_config(file, tmp_path):
    reference("llama2").save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.unlink() if file == "removed" else path.write_text(file)
    settings = load(tmp_path, dtype=torch.float32).settings
    assert settings.end_tokens == (2,)
    assert (settings.exit_layer, settings.draft_tokens) == (None, None)
