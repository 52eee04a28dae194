"""A tokenizer that went through a GGUF file gives the same token ids."""

import itertools

import gguf
import pytest
import torch
from tiny_tokenizers import (
    LLAMA3,
    PLAIN_BYTES,
    SPLITS,
    TEXTS,
    byte_level,
    checkpoint,
    metaspace,
    sentencepiece,
    split,
    whole_words,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny_models
from layerskip.cli import lens
from layerskip.export import ExportError, open_source, to_gguf, to_hf
from layerskip.export.gguf_tokenizer import TokenizerWarning
from layerskip.model import UnsupportedModelError, load, open_files


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokens_are_the_same(name, tmp_path):
    tokenizer = byte_level(SPLITS[name])
    tokenizer.add_tokens(["<think>"])
    wrapped = checkpoint(tmp_path / "model", tokenizer, spare=3)
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.pre"] == name
    again_as_before(tmp_path / "m.gguf", wrapped)


@pytest.mark.parametrize(("ignore_merges", "name"), [(True, "llama-bpe"), (False, "smaug-bpe")])
def test_words_that_are_tokens_are_merged_or_not_as_before(ignore_merges, name, tmp_path):
    wrapped = checkpoint(tmp_path / "model", whole_words(split(LLAMA3), ignore_merges))
    assert ("Ġcarrycarry" in wrapped.tokenize("they carrycarry on")) is ignore_merges
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name
    again_as_before(tmp_path / "m.gguf", wrapped)


def again_as_before(file, wrapped, texts=TEXTS):
    """The tokenizer read from the file alone gives the tokens of the one that was written."""
    assert [path.name for path in file.parent.iterdir() if path.is_file()] == [file.name]
    again = open_files(file).tokenizer()
    for text in texts:
        assert again.encode(text) == wrapped.encode(text), text
        assert again.decode(again.encode(text)) == wrapped.decode(wrapped.encode(text))
    assert again.bos_token == wrapped.bos_token
    assert again.chat_template == wrapped.chat_template


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_the_same(prefix, tmp_path):
    tokenizer = sentencepiece(prefix=prefix)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    wrapped = checkpoint(tmp_path / "model", tokenizer, spare=3, unk_token="<unk>")
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert merged_by_score(found, "▁" * prefix + "the▁ships▁carry") == (
        tokenizer.encode("the ships carry", add_special_tokens=False).tokens
    )
    # llama.cpp takes as many scores as there are tokens, whether they are there or not.
    assert len(found["tokenizer.ggml.scores"]) == len(found["tokenizer.ggml.tokens"])
    again_as_before(tmp_path / "m.gguf", wrapped)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_that_gguf_cannot_place_is_warned_of(scheme, tmp_path):
    wrapped = checkpoint(tmp_path / "model", metaspace(scheme), unk_token="<unk>")
    with pytest.warns(TokenizerWarning, match="begins with a space or follows a special token"):
        to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.add_space_prefix"] is True
    again = open_files(tmp_path / "m.gguf").tokenizer()
    assert again.encode("the ships") == wrapped.encode("the ships")
    assert again.encode(" the ships") != wrapped.encode(" the ships")


def test_a_space_that_is_nowhere_is_not_warned_of(tmp_path):
    wrapped = checkpoint(tmp_path / "model", metaspace("never"), unk_token="<unk>")
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    again_as_before(tmp_path / "m.gguf", wrapped, ["the ships", " the ships", ""])


def test_named_templates_travel(tmp_path):
    named = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    checkpoint(tmp_path / "model", byte_level(PLAIN_BYTES), chat_template=named)
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == "{{ 1 }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    assert open_files(tmp_path / "m.gguf").tokenizer().chat_template == named
    for _ in range(2):  # the folder is a checkpoint alone, which may be replaced
        to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out", overwrite=True)
        assert open_files(tmp_path / "out").tokenizer().chat_template == named
    (tmp_path / "out" / "additional_chat_templates" / "notes.txt").touch()
    with pytest.raises(ExportError, match="not just a checkpoint"):
        to_hf(open_source(tmp_path / "m.gguf"), tmp_path / "out", overwrite=True)


def merged_by_score(found, text):
    """As in llama.cpp: merge the neighbours with the highest joint score, the leftmost first."""
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    parts = list(text)
    while True:
        joined = enumerate(a + b for a, b in itertools.pairwise(parts))
        pairs = [(scores[whole], -i) for i, whole in joined if whole in scores]
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_types_special_tokens_and_template(tmp_path):
    tokenizer = byte_level(PLAIN_BYTES)
    tokenizer.add_tokens(["<think>"])
    wrapped = checkpoint(tmp_path, tokenizer, spare=2, pad_token="<|end|>")
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(wrapped) + 2
    by_token = dict(zip(tokens, types, strict=True))
    kinds = gguf.TokenType
    assert by_token["<s>"] == by_token["<|end|>"] == kinds.CONTROL
    assert by_token["<think>"] == kinds.USER_DEFINED
    assert by_token["a"] == kinds.NORMAL
    assert (tokens[-1], types[-1]) == (f"[PAD{len(wrapped) + 1}]", kinds.UNUSED)
    assert found["tokenizer.ggml.bos_token_id"] == wrapped.bos_token_id
    assert found["tokenizer.ggml.padding_token_id"] == wrapped.pad_token_id
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ 1 }}"


@pytest.mark.parametrize(("model_ends", "kept"), [([1, 2], {"eos": 1, "eot": 2}), (2, {"eos": 2})])
def test_the_tokenizers_own_end_leads_where_the_settings_know_it(model_ends, kept, tmp_path):
    wrapped = checkpoint(tmp_path, byte_level(PLAIN_BYTES))
    assert wrapped.eos_token_id == 1
    model = tiny_models.build("llama2", vocab_size=len(wrapped))
    model.generation_config.eos_token_id = model_ends
    model.save_pretrained(tmp_path)
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    names = {name: found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    assert {name: token for name, token in names.items() if token is not None} == kept


def test_a_checkpoint_without_a_tokenizer_goes_without(saved, tmp_path):
    to_gguf(open_source(saved("llama2")), tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "none"
    loaded = load(tmp_path / "m.gguf", dtype=torch.float32)
    assert loaded.tokenizer is None
    assert loaded.settings.end_tokens == (2,)


def _lowercase(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def _by_digits(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)


def _without_bytes(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(SPLITS["qwen2"])[:1])


@pytest.mark.parametrize(
    ("tokenizer", "change", "message"),
    [
        (byte_level(PLAIN_BYTES), _lowercase, "normalizer has a step Lowercase"),
        (sentencepiece(prefix=True), _lowercase, "normalizer has a step Lowercase"),
        (sentencepiece(prefix=False), _by_digits, "pre_tokenizer has a step Digits"),
        (byte_level(SPLITS["qwen2"]), _without_bytes, "splits a text has no known name"),
        (byte_level(split(r"\w+|\W+")), lambda _: None, "named llama-bpe, qwen2, tekken, smollm"),
        (whole_words(PLAIN_BYTES), lambda _: None, r"leaves words that are tokens, llama\.cpp's"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tokenizer, change, message, tmp_path):
    change(tokenizer)
    checkpoint(tmp_path, tokenizer, unk_token="<unk>")
    with pytest.raises(UnsupportedModelError, match=message):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")


def test_composed_letters_are_taken_as_they_are(tmp_path):
    tokenizer = byte_level(SPLITS["qwen2"])
    tokenizer.normalizer = normalizers.NFC()
    wrapped = checkpoint(tmp_path / "model", tokenizer)
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    again_as_before(tmp_path / "m.gguf", wrapped)


@pytest.mark.parametrize("around", ["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
def test_tokens_around_a_text(around, tmp_path):
    tokenizer = byte_level(PLAIN_BYTES)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    wrapped = checkpoint(tmp_path / "model", tokenizer)
    model = tiny_models.build("llama2", vocab_size=len(wrapped))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "model")
    to_gguf(open_source(tmp_path / "model"), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is around.startswith("<s>")
    assert found["tokenizer.ggml.add_eos_token"] is around.endswith("</s>")
    again_as_before(tmp_path / "m.gguf", wrapped)


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    checkpoint(tmp_path, Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")))
    with pytest.raises(UnsupportedModelError, match="a WordLevel tokenizer cannot"):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")


def test_more_tokens_than_rows_are_refused(tmp_path):
    wrapped = checkpoint(tmp_path, byte_level(PLAIN_BYTES))
    tiny_models.build("llama2", vocab_size=len(wrapped) - 1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"has {len(wrapped)} tokens, the embedding"):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")


def test_a_continuation_looked_at_stands_behind_its_prompt_without_a_space():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece(prefix=True))
    ids = tokenizer.encode("in 18")
    behind = lens._continuation_ids(tokenizer, "in 18", ids, "68")
    assert tokenizer.decode([*ids, *behind], skip_special_tokens=True).endswith("in 1868")
