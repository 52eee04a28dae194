"""Differences to a base: written, merged, and refused where they do not fit."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import differences
import tiny_models
from layerskip import CheckpointError, LayerSkipModel, merge
from layerskip.export import ExportError, open_source, to_difference
from layerskip.model.files.difference import BLOCK


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders `base` and `trained`, and the file `x.safetensors`; do not change them."""
    folder = tmp_path_factory.mktemp("made")
    differences.base(folder / "base")
    differences.trained(folder / "base", folder / "trained")
    written = to_difference(
        open_source(folder / "trained"), folder / "x.safetensors", base=str(folder / "base")
    )
    return folder, written


@pytest.fixture
def place(made, tmp_path):
    """A folder of one's own with the file in it: (the base, the file)."""
    folder, _ = made
    shutil.copy(folder / "x.safetensors", tmp_path / "x.safetensors")
    return folder / "base", tmp_path / "x.safetensors"


def rewritten(file, tensors=None, **metadata):
    """Change a file's tensors by a function, or its metadata."""
    with safe_open(file, framework="pt") as opened:
        known = opened.metadata()
    state = load_file(file)
    if tensors is not None:
        tensors(state)
    save_file(state, file, metadata=known | metadata)


# --- there and back


def test_merged_weights_are_near_the_trained_ones(made, tmp_path):
    folder, written = made
    merge(folder / "x.safetensors", tmp_path / "out", base=folder / "base")
    before, after = differences.weights(folder / "base"), differences.weights(folder / "trained")
    for name, found in differences.weights(tmp_path / "out").items():
        change = after[name] - before[name]
        error = (found - after[name]).norm() / change.norm()
        if change.ndim == 2:
            assert 0.28 < error < 0.38, name  # 0.34 of a Gaussian, and bfloat16 on top
        else:
            assert error < 0.15, name  # bfloat16 of numbers near 1
    kinds = written.relative_errors
    assert set(kinds) == {
        *("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert all(
        error == 0.0 if "norm" in kind else 0.3 < error < 0.36 for kind, error in kinds.items()
    )


def test_a_merged_folder_is_an_ordinary_checkpoint(made, tmp_path):
    folder, _ = made
    merge(folder / "x.safetensors", tmp_path / "out", base=folder / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(folder / "base" / "model.safetensors")
    )
    ours = LayerSkipModel.from_pretrained(tmp_path / "out", dtype="float32")
    prompt = ours.tokenizer("Hello", return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    # What has travelled makes transformers draft by early exit too.
    answer = theirs.float().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    found = ours.generate("Hello", mode="self-speculative", max_new_tokens=12)
    assert found.token_ids == answer[0, prompt.shape[1] :].tolist()
    assert (found.exit_layer, found.draft_tokens) == (2, 3)
    assert ours.settings.draft_vocabulary == (5, 6, 7, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


def test_what_is_known_of_other_numbers_does_not_travel(made, tmp_path):
    folder, _ = made
    merge(folder / "x.safetensors", tmp_path / "out", base=folder / "base")
    own = json.loads((tmp_path / "out" / "generation_config.json").read_text())["layerskip"]
    assert own == {"draft_vocabulary": "5 6 7"}


def test_no_difference_gives_the_base(made, tmp_path):
    folder, _ = made
    base = folder / "base"
    written = to_difference(open_source(base), tmp_path / "x.safetensors", base=str(base))
    assert set(written.relative_errors.values()) == {0.0}
    merge(tmp_path / "x.safetensors", tmp_path / "out", base=base)
    expected = load_file(base / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)


@pytest.mark.parametrize("case", ["llama2", "qwen2"])
def test_a_head_of_its_own_and_biases(case, tmp_path):
    differences.base(tmp_path / "base", case)
    differences.trained(tmp_path / "base", tmp_path / "trained")
    source = open_source(tmp_path / "trained")
    to_difference(source, tmp_path / "x.safetensors", base=str(tmp_path / "base"))
    merge(tmp_path / "x.safetensors", tmp_path / "out", base=tmp_path / "base")
    after = differences.weights(tmp_path / "trained")
    found = differences.weights(tmp_path / "out")
    assert found.keys() == after.keys()
    assert all((found[name] - after[name]).abs().max() < 0.06 for name in found)


def test_a_gguf_file_as_the_base(tmp_path):
    """Its rows of Q and K lie in another order, and its tokenizer is inside."""
    file = tmp_path / "base.gguf"
    differences.gguf_base(file, tmp_path / "plain")
    differences.trained(tmp_path / "plain", tmp_path / "trained")
    source = open_source(tmp_path / "trained")
    written = to_difference(source, tmp_path / "x.safetensors", base=str(file))
    assert written.relative_errors["q_proj"] < 0.36
    merge(tmp_path / "x.safetensors", tmp_path / "out", base=file)
    after = differences.weights(tmp_path / "trained")
    found = differences.weights(tmp_path / "out")
    assert all((found[name] - after[name]).abs().max() < 0.06 for name in after)
    assert LayerSkipModel.from_pretrained(tmp_path / "out").tokenizer is not None


def test_bytes_are_those_of_the_codes(made):
    folder, written = made
    file = folder / "x.safetensors"
    shapes = [tuple(t.shape) for t in load_file(folder / "base" / "model.safetensors").values()]
    expected = sum(
        4 * shape[0]
        if len(shape) == 1
        else shape[0] * (-(-shape[1] // 4) + 2 * -(-shape[1] // BLOCK))
        for shape in shapes
    )
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert written.bytes == file.stat().st_size == expected + header
    assert written.stored_as == {"2-bit": 1 + 7 * 4, "F32": 1 + 2 * 4}
    assert written.tensors == len(shapes)


def test_what_drafts_can_have_more_bits(made, tmp_path):
    """Embedding, head and the layers below exit 2 have 4 bits, layers 2 and 3 have one."""
    folder, _ = made
    file = tmp_path / "y.safetensors"
    source = open_source(folder / "trained")
    written = to_difference(source, file, base=str(folder / "base"), bits=1, draft_bits=4)
    assert written.stored_as == {"4-bit": 1 + 7 * 2, "1-bit": 7 * 2, "F32": 1 + 2 * 4}
    merge(file, tmp_path / "out", base=folder / "base")
    before, after = differences.weights(folder / "base"), differences.weights(folder / "trained")
    for name, found in differences.weights(tmp_path / "out").items():
        error = (found - after[name]).norm() / (after[name] - before[name]).norm()
        if "norm" not in name:
            fine = "layers.2." not in name and "layers.3." not in name
            assert (error < 0.2) if fine else (0.5 < error < 0.65), name


@pytest.mark.parametrize("bits", [{"bits": 3}, {"draft_bits": 8}])
def test_other_numbers_of_bits_are_refused(made, tmp_path, bits):
    source = open_source(made[0] / "trained")
    with pytest.raises(ValueError, match=r"1, 2 or 4 bits a weight, not \d"):
        to_difference(source, tmp_path / "y.safetensors", base=str(made[0] / "base"), **bits)
    assert not any(tmp_path.iterdir())


def test_draft_bits_need_an_exit_layer(made, tmp_path):
    base = made[0] / "base"
    with pytest.raises(ValueError, match="base names no exit layer"):
        to_difference(open_source(base), tmp_path / "y.safetensors", base=str(base), draft_bits=4)


def test_a_text_that_would_change_nothing_is_refused(made, tmp_path):
    base, source = str(made[0] / "base"), open_source(made[0] / "trained")
    with pytest.raises(ValueError, match="a text changes nothing in 4 bits"):
        to_difference(source, tmp_path / "y.safetensors", base=base, bits=4, tokens=[1] * 9)


def test_a_difference_names_its_base_without_its_folder(made):
    folder, _ = made
    with safe_open(folder / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base"] == "base"
    assert str(folder) not in json.dumps(metadata)


# --- writing that fails


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama2", {}, r"only one of them has the tensor lm_head\.weight"),
        ("smollm2", {"vocab_size": 300}, r"embed_tokens\.weight is \(300, 48\) there, \(\d+, 48\)"),
        ("smollm2", {"num_hidden_layers": 5}, r"only one of them has the tensor model\.layers\.4"),
    ],
)
def test_another_model_as_the_base_is_refused(made, tmp_path, case, changes, message):
    folder, _ = made
    tiny_models.build(case, **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"other is not what .*trained was .*{message}"):
        to_difference(
            open_source(folder / "trained"),
            tmp_path / "x.safetensors",
            base=str(tmp_path / "other"),
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_weights_that_are_no_numbers_are_refused(made, tmp_path):
    folder, _ = made
    shutil.copytree(folder / "trained", tmp_path / "trained")
    file = tmp_path / "trained" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is too large, or no"
    ):
        to_difference(
            open_source(tmp_path / "trained"),
            tmp_path / "x.safetensors",
            base=str(folder / "base"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_export_leaves_nothing(made, tmp_path, fault):
    folder, _ = made

    def interrupt(done, total):
        raise fault

    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else ExportError):
        to_difference(
            open_source(folder / "trained"),
            tmp_path / "x.safetensors",
            base=str(folder / "base"),
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(made, tmp_path):
    folder, _ = made
    with pytest.raises(ValueError, match=r"x\.bin does not end in \.safetensors"):
        to_difference(open_source(folder / "trained"), tmp_path / "x.bin", base="base")


# --- merging that fails


def refused(place, message):
    """Merging says this in one line and leaves nothing."""
    base, file = place
    with pytest.raises(CheckpointError, match=message) as caught:
        merge(file, file.parent / "out", base=base)
    assert "\n" not in str(caught.value)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_base_is_refused(place, made):
    _, file = place
    folder, _ = made
    refused(
        (folder / "trained", file), "is a difference to weights with the sha256 [0-9a-f]{64}, and"
    )


def test_a_base_that_nobody_knows_has_to_be_given(place):
    _, file = place
    refused((None, file), r"difference to 'base', which is no built-in model; say where")


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


NORM, HEAD = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(NORM), f"it lacks the tensor {NORM}"),
        (drop(f"{HEAD}.scales"), f"it lacks the tensor {HEAD}.scales"),
        (put("lm_head.weight", torch.ones(3)), r"it has the tensor lm_head\.weight"),
        (put(NORM, torch.ones(3)), rf"{NORM} is F32 \[3\], torch\.float32 \[48\] is needed"),
        (put(NORM, torch.ones(48).half()), rf"{NORM} is F16 \[48\]"),
        (put(NORM, torch.ones(48).bfloat16()), rf"{NORM} is BF16 \[48\]"),
        (
            put(f"{HEAD}.codes", torch.ones(2, 2, dtype=torch.uint8)),
            rf"{HEAD}.codes is U8 \[2, 2\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(place, change, message):
    rewritten(place[1], change)
    refused(place, f"does not fit its base: .*{message}")


def test_files_that_are_no_difference_are_refused(place, made):
    base, file = place
    shutil.copy(base / "model.safetensors", file)
    refused(place, "is no difference of `layerskip export --to difference`")
    shutil.copy(base / "config.json", file)
    refused(place, "is damaged or incomplete")
    file.write_bytes((made[0] / "x.safetensors").read_bytes()[:-100])
    refused(place, "is damaged or incomplete")


def test_a_later_version_is_refused(place):
    rewritten(place[1], version="2")
    refused(place, "of version 2, and this layerskip reads version 1; install a newer one")


def test_no_code_comes_with_a_difference(place):
    base, file = place
    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
    named = {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "_attn_implementation": "none/none"}
    named |= {"experts_implementation": "none/none", "transformers_weights": "other.safetensors"}
    rewritten(file, config=json.dumps(config | named))
    merge(file, file.parent / "out", base=base)
    written = json.loads((file.parent / "out" / "config.json").read_text())
    assert not named.keys() & written.keys()


def test_what_is_there_is_not_replaced(place):
    base, file = place
    (file.parent / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists; choose another name"):
        merge(file, file.parent / "out", base=base)


def test_a_missing_folder_is_named(place):
    base, file = place
    with pytest.raises(CheckpointError, match=r"nowhere.* cannot be written"):
        merge(file, file.parent / "nowhere" / "out", base=base)
