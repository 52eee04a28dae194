"""Tokenizers out of folders and GGUF files."""

import shutil
import subprocess
import sys

import gguf_files
import pytest
import torch
from transformers import AutoTokenizer

from layerskip.fileio import CheckpointError, check_within, read_json, write_json
from layerskip.model import UnsupportedModelError, load, tokenizer
from layerskip.model.weights import GgufFile
from layerskip.training import TrainConfig
from layerskip.training.loading import load_tokenizer
from tiny_models import build, reference

MODEL = {"vocab_size": 270}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, build("llama2", **MODEL), tokenizer="smollm")
    return path


def test_digits_are_split_before_all_else(file):
    """So that both spaces before a number stay together, as SmolLM2 was trained."""
    own = load(file, dtype=torch.float32).tokenizer
    assert own.tokenize("a  57") == ["a", "ĠĠ", "5", "7"]
    assert own.tokenize("a  a") == ["a", "Ġ", "Ġa"]


def test_chat_template_and_end_token_are_the_files_own(file):
    checkpoint = load(file, dtype=torch.float32)
    end = checkpoint.tokenizer.convert_tokens_to_ids("<|end|>")
    assert checkpoint.settings.end_tokens == (end,)
    chat = [{"role": "user", "content": "aa"}]
    assert checkpoint.tokenizer.apply_chat_template(chat, tokenize=False) == "aa<|end|>"


def test_text_survives_a_round_trip(file):
    for text in ("plain words", "  spaces ", "日本語 é\n\ttabs", "1 234  5"):
        own = load(file, dtype=torch.float32).tokenizer
        assert own.decode(own.encode(text)) == text


def test_a_file_that_is_named_itself_has_its_own_tokenizer(file):
    inside = tokenizer.load(file.parent, GgufFile(file))
    inside.add_tokens(["<only-in-the-folder>"])
    inside.save_pretrained(file.parent)
    found = load(file, dtype=torch.float32).tokenizer
    assert "<only-in-the-folder>" not in found.get_vocab()
    assert (found.eos_token, found.chat_template) == ("<|end|>", inside.chat_template)
    assert len(found) == MODEL["vocab_size"]  # and no token more


def test_a_name_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, build("llama2", **MODEL), tokenizer="deepseek-coder")
    with pytest.raises(UnsupportedModelError, match="splits texts as deepseek-coder"):
        load(path, dtype=torch.float32)


def test_what_the_file_does_not_say_follows_from_the_name(tmp_path):
    for name, begins in (("llama-bpe", True), ("llama3", True), ("qwen2", False)):
        path = tmp_path / "model.gguf"
        gguf_files.write(path, build("llama2", **MODEL), tokenizer=name)
        own = load(path, dtype=torch.float32).tokenizer
        assert own.encode("a")[:-1] == ([own.bos_token_id] if begins else [])
        assert own.encode("a", add_special_tokens=False) == own.convert_tokens_to_ids(["a"])
        # A word that is a token is one, merges or not, as llama.cpp has it for these.
        assert own.tokenize("  ") == ["\u0120\u0120"]


class Named:
    """A file of these fields."""

    def __init__(self, **fields):
        self.fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}

    def field(self, key, default=None):
        return self.fields.get(key, default)


def test_ends_are_known_by_their_names_too():
    """Of any type: finetunes have added them as tokens of the user's."""
    tokens = {"tokens": ["a", "</s>", "<|im_end|>", "b", "<|end|>"], "token_type": [1, 3, 3, 1, 4]}
    assert tokenizer.end_tokens(Named(eos_token_id=1, **tokens)) == [1, 2, 4]
    assert tokenizer.end_tokens(Named(eos_token_id=1, eot_token_id=3, **tokens)) == [
        1,
        3,
        2,
        4,
    ]


def test_a_special_token_that_is_none_is_left_out():
    fields = {"tokens": ["a", "b"], "bos_token_id": 1, "padding_token_id": 2**32 - 1}
    assert tokenizer.special_token_ids(Named(eos_token_id=2, **fields)) == {"bos_token_id": 1}
    assert tokenizer.end_tokens(Named(eos_token_id=2, **fields)) == []


def test_files_of_the_folder_come_before_the_gguf_file(file):
    inside = tokenizer.load(file.parent, GgufFile(file))
    inside.add_tokens(["<only-in-the-folder>"])
    inside.save_pretrained(file.parent)
    found = load(file.parent, dtype=torch.float32).tokenizer
    assert "<only-in-the-folder>" in found.get_vocab()


def test_checkpoints_without_a_tokenizer(tmp_path):
    (tmp_path / "folder").mkdir()
    reference("llama2").save_pretrained(tmp_path / "folder")
    gguf_files.write(tmp_path / "model.gguf", reference("llama2"))
    for path in (tmp_path / "folder", tmp_path / "model.gguf"):
        assert load(path, dtype=torch.float32).tokenizer is None


_WHAT_IS_IMPORTED = """
import sys
from pathlib import Path
from layerskip.model import tokenizer
tokenizer.load(Path(sys.argv[1]))
print("transformers.configuration_utils" in sys.modules)
"""


def test_a_generic_tokenizer_is_the_same_without_the_code_of_models(file, tmp_path):
    """That code takes longer to import than the model to load."""
    inside = tokenizer.load(file.parent, GgufFile(file))
    inside.save_pretrained(str(tmp_path / "saved"))
    saved = tokenizer.load(tmp_path / "saved")
    chosen = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert type(saved) is type(chosen)
    text = "a  57 <|end|> é\n\n  b"
    assert saved.encode(text) == chosen.encode(text) == inside.encode(text)
    assert saved.chat_template == chosen.chat_template
    command = [sys.executable, "-c", _WHAT_IS_IMPORTED, str(tmp_path / "saved")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["GPT2TokenizerFast"])
def test_digits_stay_apart_whatever_the_class_is_called(kind, file, tmp_path):
    """transformers 5 builds this class anew, without the digits of tokenizer.json."""
    inside = tokenizer.load(file.parent, GgufFile(file))
    inside.save_pretrained(str(tmp_path / "saved"))
    settings = tmp_path / "saved" / "tokenizer_config.json"
    write_json(settings, {**read_json(settings), "tokenizer_class": kind})
    text = "a  57\n\n2."
    assert tokenizer.load(tmp_path / "saved").encode(text) == inside.encode(text)
    config = TrainConfig(model=str(tmp_path / "saved"), data="x", output="y")
    write_json(tmp_path / "saved" / "config.json", {"model_type": "llama"})
    assert load_tokenizer(config).encode(text) == inside.encode(text)


def with_code(folder, marker, **more):
    """A checkpoint that brings code, and names it so that transformers may forget it is not to run."""
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    kinds = dict.fromkeys(("AutoProcessor", "AutoConfig", "AutoModelForCausalLM"), "code.Evil")
    for name in ("tokenizer_config.json", "config.json"):
        before = read_json(folder / name) if (folder / name).is_file() else {"model_type": "llama"}
        write_json(folder / name, {**before, "auto_map": kinds, **more.get(name, {})})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer_config.json", "AutoProcessor"),
        ("tokenizer_config.json", 7),
        ("config.json", "RagTokenizer"),
        ("config.json", "LlamaForCausalLM"),
    ],
)
def test_classes_that_are_no_tokenizers_are_refused(file, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, marker = tmp_path / "saved", tmp_path / "ran"
    tokenizer.load(file.parent, GgufFile(file)).save_pretrained(str(folder))
    if name == "config.json":
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": None})
    with_code(folder, marker, **{name: {"tokenizer_class": kind}})
    with pytest.raises(CheckpointError, match="which is none"):
        tokenizer.load(folder)
    with pytest.raises(ValueError, match="which is none"):
        load_tokenizer(TrainConfig(model=str(folder), data="x", output="y"))
    assert not marker.exists()


def test_transformers_asks_nobody_whether_code_may_run(file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    folder, marker = tmp_path / "saved", tmp_path / "ran"
    tokenizer.load(file.parent, GgufFile(file)).save_pretrained(str(folder))
    with_code(folder, marker, **{"tokenizer_config.json": {"tokenizer_class": "AutoProcessor"}})
    with tokenizer.quiet_transformers(), pytest.raises(ValueError, match="custom code"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert not asked
    assert not marker.exists()


def test_a_list_of_special_tokens_is_written_for_both_versions_of_transformers(file, tmp_path):
    """5 saves the list under a name under which 4 wants a dict."""
    own = load(file, dtype=torch.float32).tokenizer
    own.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    (tmp_path / "model").mkdir()
    own.save_pretrained(tmp_path / "model")
    assert read_json(tmp_path / "model" / "tokenizer_config.json")["extra_special_tokens"] == [
        "<turn>"
    ]
    (tmp_path / "out").mkdir()
    tokenizer.write(tmp_path / "model", tmp_path / "out")
    fields = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert fields["additional_special_tokens"] == ["<turn>"]
    assert "extra_special_tokens" not in fields
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(again.all_special_ids) == set(own.all_special_ids)


def test_a_link_out_of_the_folder_is_not_followed(file, tmp_path):
    """It would carry another file of the machine into what is passed on."""
    inside, hub = tmp_path / "model", tmp_path / "hub" / "snapshots" / "abc"
    for folder in (inside, hub, tmp_path / "hub" / "blobs"):
        folder.mkdir(parents=True)
    tokenizer.load(file.parent, GgufFile(file)).save_pretrained(str(inside))
    secret = tmp_path / "secret"
    secret.write_text("a token")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(inside / name, tmp_path / "hub" / "blobs" / name)
        (hub / name).symlink_to(tmp_path / "hub" / "blobs" / name)
    (tmp_path / "copy").mkdir()
    tokenizer.write(hub, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    shared = tmp_path / "cache" / "blobs" / "ab" / "abc"
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot, blob = repository / "snapshots" / "abc", repository / "blobs" / "123"
    for folder in (shared.parent, snapshot, blob.parent):
        folder.mkdir(parents=True)
    shared.write_text("{}")
    blob.symlink_to(shared)
    (snapshot / "tokenizer.json").symlink_to(blob)
    tokenizer.write(
        snapshot, tmp_path / "copy"
    )  # as the hub's cache has what many repositories have
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="outside of its folder"):  # it is not ours to change
        check_within(snapshot / "tokenizer.json")
    (inside / "merges.txt").symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=r"merges\.txt is a link to .*, outside of its folder"
    ):
        tokenizer.write(inside, tmp_path / "copy")
    assert not (tmp_path / "copy" / "merges.txt").exists()
