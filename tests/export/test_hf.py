"""transformers checkpoints: loaded without this package, whole and as drafts."""

import json

import gguf_files
import pytest
import torch
from exported_cases import WRITTEN
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny_models
from layerskip.export import hf, open_source, to_gguf, to_hf
from layerskip.model import UnsupportedModelError
from tiny_models import token_ids

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # float32


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("case", ["llama3.2", "llama-yarn", "llama-biases", "qwen2-sliding"])
def test_a_copy_is_the_same_model(case, saved, theirs, tmp_path):
    written = to_hf(open_source(saved(case)), tmp_path / "out")
    assert written.carried_over == written.tensors
    tokens = token_ids(case, 40)
    assert torch.equal(theirs(tmp_path / "out", tokens), theirs(saved(case), tokens))
    tied = tiny_models.reference(case).config.tie_word_embeddings
    assert ("lm_head.weight" in names_in(tmp_path / "out")) is not tied


@pytest.mark.parametrize("case", WRITTEN)
def test_a_gguf_file_becomes_the_model_that_it_was_made_from(case, saved, theirs, tmp_path):
    to_gguf(open_source(saved(case)), tmp_path / "m.gguf", weights="f32")
    to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out")
    tokens = token_ids(case, 40)
    found = theirs(tmp_path / "out", tokens)
    torch.testing.assert_close(found, theirs(saved(case), tokens), **TOLERANCE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = type(tiny_models.reference(case)).__name__
    # GGUF has no word for Mistral; without a window it is a Llama.
    named = "LlamaForCausalLM" if case == "mistral-unlimited" else own
    assert config["architectures"] == [named]


def test_older_programs_read_the_rotary_base_and_its_scaling(saved, tmp_path):
    to_gguf(open_source(saved("llama3.1")), tmp_path / "m.gguf", weights="f32")
    to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    now = config["rope_parameters"]
    assert config["rope_theta"] == now["rope_theta"] != 10_000.0
    scaling = {k: v for k, v in now.items() if k != "rope_theta"}
    assert config["rope_scaling"] == scaling | {"type": "llama3"}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert loaded.rope_parameters == now | {"type": "llama3"}
    # Of a folder that transformers 5 wrote:
    to_hf(open_source(saved("llama3.1")), tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta", "rope_scaling", "torch_dtype"):
        assert copied[name] == config[name]


def test_quantized_weights_become_the_numbers_that_they_stand_for(theirs, ours, tmp_path):
    model = tiny_models.build("llama2", head_dim=32)
    gguf_files.write(tmp_path / "m.gguf", model, kind=gguf_files.KINDS[-1])
    written = to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out")
    assert set(written.stored_as) == {"F32"}
    tokens = token_ids("llama2", 40)
    torch.testing.assert_close(
        theirs(tmp_path / "out", tokens), ours(tmp_path / "m.gguf", tokens), **TOLERANCE
    )


@pytest.mark.parametrize("case", ["llama3.2", "qwen2-sliding"])
def test_a_draft_is_our_early_exit(case, saved, ours, theirs, tmp_path):
    written = to_hf(open_source(saved(case), 3), tmp_path / "out")
    assert (written.layers, written.format) == (3, "hf-draft")
    tokens = token_ids(case, 40)
    found = theirs(tmp_path / "out", tokens)
    torch.testing.assert_close(found, ours(saved(case), tokens, 3), **TOLERANCE)


@pytest.mark.parametrize("case", ["llama2", "qwen2-sliding"])
def test_transformers_drafts_with_it_and_answers_the_same(case, saved, tmp_path):
    to_hf(open_source(saved(case), 2), tmp_path / "draft")
    model = AutoModelForCausalLM.from_pretrained(saved(case), dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    calls = []
    draft.register_forward_hook(lambda *_: calls.append(1))
    tokens = token_ids(case, 1, 12)
    greedy = {
        "do_sample": False,
        "max_new_tokens": 20,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }
    plain = model.generate(tokens, **greedy)
    assert torch.equal(model.generate(tokens, assistant_model=draft, **greedy), plain)
    assert calls


@pytest.mark.parametrize("weights", hf.HF_WEIGHTS)
def test_weights_are_cast_and_the_config_says_so(weights, saved, tmp_path):
    dtype = hf.HF_WEIGHTS[weights]
    to_hf(open_source(saved("qwen2-tied")), tmp_path / "out", weights=weights)
    expected = tiny_models.reference("qwen2-tied").state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].to(dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype


@pytest.mark.parametrize("write", [to_hf, to_gguf])
def test_numbers_that_float16_does_not_hold_are_refused(write, tmp_path):
    model = tiny_models.build("llama2")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 70_000.0
    model.save_pretrained(tmp_path / "in")
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* choose bf16"):
        write(open_source(tmp_path / "in"), out, weights="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_large_models_are_written_in_shards(saved, theirs, monkeypatch, tmp_path):
    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    to_hf(open_source(saved("llama2")), tmp_path / "out")
    files = sorted(tmp_path.joinpath("out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    tokens = token_ids("llama2", 20)
    assert torch.equal(theirs(tmp_path / "out", tokens), theirs(saved("llama2"), tokens))
    again = to_hf(open_source(tmp_path / "out", 2), tmp_path / "draft")  # and read again
    assert again.layers == 2


def test_settings_travel_with_the_whole_model_and_not_with_a_draft(tmp_path):
    model = tiny_models.build("llama2")
    model.generation_config.assistant_early_exit = 2
    model.generation_config.num_assistant_tokens = 4
    model.save_pretrained(tmp_path / "in")
    for exit_layer, early_exit in [(None, 2), (2, None)]:
        out = tmp_path / f"out{exit_layer}"
        to_hf(open_source(tmp_path / "in", exit_layer), out)
        fields = json.loads((out / "generation_config.json").read_text())
        assert fields.get("assistant_early_exit") == early_exit
        assert fields["num_assistant_tokens"] == 4
        assert fields["eos_token_id"] == 2


def test_special_tokens_travel_where_the_config_alone_names_them(tmp_path):
    tiny_models.build("llama2", pad_token_id=0, bos_token_id=1).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").unlink()
    to_hf(open_source(tmp_path / "in"), tmp_path / "out")
    made = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)


def test_no_code_travels_with_a_checkpoint(tmp_path):
    tiny_models.build("llama2").save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    named = {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "experts_implementation": "none/none"}
    named |= dict.fromkeys(("attn_implementation", "_attn_implementation"), "none/none")
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    to_hf(open_source(tmp_path / "in"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not named.keys() & written.keys()


def test_rotary_factors_of_no_llama_are_refused(tmp_path):
    factors = torch.linspace(1, 3, 8).numpy()
    gguf_files.write(
        tmp_path / "m.gguf",
        tiny_models.reference("llama2"),
        extra_tensors={"rope_freqs.weight": factors},
    )
    with pytest.raises(UnsupportedModelError, match="rotary frequency factors"):
        to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out")


def test_rotary_factors_beside_linear_scaling_are_refused(tmp_path):
    model = tiny_models.reference("llama-linear")
    factors = torch.ones(8).numpy()  # of a llama3 scaling by 1
    gguf_files.write(tmp_path / "m.gguf", model, extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModelError, match="factors and linear scaling; transformers has"):
        to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out")


def test_other_weights_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="f32, f16, bf16"):
        to_hf(open_source(saved("llama2")), tmp_path / "out", weights="q8_0")


def test_a_head_that_is_not_the_embedding_is_kept_whatever_the_config_says(saved, theirs, tmp_path):
    to_hf(open_source(saved("llama2")), tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    written = to_hf(open_source(tmp_path / "in"), tmp_path / "out")
    assert not written.tied_head
    tokens = token_ids("llama2", 40)
    assert torch.equal(theirs(tmp_path / "out", tokens), theirs(saved("llama2"), tokens))
