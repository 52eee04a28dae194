"""Tokens as text that can be seen."""

from scripted import TOKENIZER, encode, words
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from layerskip.lens import Symbols, visible


def test_visible():
    for text, seen in (
        (" a", "·a"),
        ("\n\t\r", "↵⇥␍"),
        ("\x1b[31m", "\\u001b[31m"),  # a terminal would obey
        ("\N{RIGHT-TO-LEFT OVERRIDE}x\N{ZERO WIDTH SPACE}", "\\u202ex\\u200b"),
        ("é鍵", "é鍵"),
    ):
        assert visible(text) == seen


def test_byte_level_tokens():
    symbols = Symbols(TOKENIZER)
    assert [symbols[t] for t in words("hello", "Ġworld", "<end>")] == ["hello", "·world", "<end>"]
    assert symbols[encode("é")[0]] == "\N{REPLACEMENT CHARACTER}"  # half a character


def test_the_space_that_some_tokenizers_drop_is_kept():
    vocabulary = {"<unk>": 0, "▁big": 1, "ger": 2, "▁": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert wrapped.decode([1]) == "big"
    symbols = Symbols(wrapped)
    assert [symbols[i] for i in (1, 2, 3)] == ["·big", "ger", "·"]


def test_without_a_tokenizer():
    assert Symbols(None)[12] == "#12"
