"""A tokenizer that went through a GGUF file gives the same token ids."""

import itertools
import json

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import tiny_models
from layerskip.export import open_source, to_gguf
from layerskip.model import UnsupportedModelError, load, open_files

TEXT = """The ships of 1868 brought 12345 bales of wool; they didn't carry salt.
    def fib(n):\n\n        return n if n < 2 else fib(n - 1) + fib(n - 2)  # naïve, 日本語 😀
"""
TEXTS = [
    TEXT,
    "in  1868",
    " a",
    "",
    "don't WE'LL",
    "a\n\n\n b",
    "é½  ",
    "Hello <|end|> there<think>x",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS = {
    "gpt-2": PLAIN_BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), PLAIN_BYTES]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
}


def byte_level(pre_tokenizer, vocab_size=320):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def sentencepiece(*, prefix):
    """As Llama 2 has it: merges over characters with ▁ for a space, bytes for what is unknown."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trained.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )

    described = json.loads(trained.to_str())["model"]
    pieces = sorted(described["vocab"], key=described["vocab"].get)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    singles, merged = [p for p in pieces if len(p) == 1], [p for p in pieces if len(p) > 1]
    vocab = {token: i for i, token in enumerate([*first, *merged, *singles])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(merge) for merge in described["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def checkpoint(folder, tokenizer, *, spare=0, **names):
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"} | names
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    tiny_models.build("llama2", vocab_size=len(wrapped) + spare).save_pretrained(folder)
    return wrapped


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokens_are_the_same(name, tmp_path):
    tokenizer = byte_level(SPLITS[name])
    tokenizer.add_tokens(["<think>"])
    wrapped = checkpoint(tmp_path, tokenizer, spare=3)
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.pre"] == name
    again = open_files(tmp_path / "m.gguf").tokenizer()
    for text in TEXTS:
        assert again.encode(text) == wrapped.encode(text)
        assert again.decode(again.encode(text)) == wrapped.decode(wrapped.encode(text))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_the_same(prefix, tmp_path):
    tokenizer = sentencepiece(prefix=prefix)
    checkpoint(tmp_path, tokenizer, unk_token="<unk>")
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert merged_by_score(found, "▁" * prefix + "the▁ships▁carry") == (
        tokenizer.encode("the ships carry", add_special_tokens=False).tokens
    )


def merged_by_score(found, text):
    """What llama.cpp does: join the neighbours whose whole has the highest score, the leftmost first."""
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


def test_an_unknown_way_to_split_is_refused(tmp_path):
    checkpoint(tmp_path, byte_level(split(r"\w+|\W+")))
    with pytest.raises(
        UnsupportedModelError, match="named llama-bpe, qwen2, tekken, smollm, gpt-2"
    ):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    checkpoint(tmp_path, Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")))
    with pytest.raises(UnsupportedModelError, match="a WordLevel tokenizer cannot"):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")


def test_more_tokens_than_rows_are_refused(tmp_path):
    wrapped = checkpoint(tmp_path, byte_level(PLAIN_BYTES))
    tiny_models.build("llama2", vocab_size=len(wrapped) - 1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"has {len(wrapped)} tokens, the embedding"):
        to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
