"""Text and bytes of single tokens, and text by the source of its tokens."""

import pytest

from layerskip.serve.answers import SourceRuns
from layerskip.serve.engine import Tokens
from layerskip.serve.token_text import token_bytes, token_text


@pytest.fixture(scope="module")
def tokenizer(server):
    return server.model.tokenizer


class SentencePiece:
    """Two tokens of a SentencePiece vocabulary."""

    def convert_ids_to_tokens(self, token_id):
        return ["\u2581Hello", "<0xE2>"][token_id]

    def decode(self, ids, **options):
        return ["Hello", "\N{REPLACEMENT CHARACTER}"][ids[0]]


def test_bytes_of_tokens_join_to_their_text(tokenizer):
    text = "Na\u00efve \N{SNOWMAN}\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    assert token_text(tokenizer, ids[0]) == "N"


def test_sentencepiece_keeps_spaces_and_bytes():
    assert token_text(SentencePiece(), 0) == " Hello"
    assert token_bytes(SentencePiece(), 0) == b" Hello"
    assert token_bytes(SentencePiece(), 1) == b"\xe2"


def test_token_without_a_tokenizer_is_its_number():
    assert token_text(None, 7) == "7"


def test_text_is_split_by_the_sources_of_its_tokens(tokenizer):
    ids = tokenizer.encode("abcd\u00e9", add_special_tokens=False)
    sources = ("model", "n-gram", "n-gram", "early-exit", "model", "n-gram")
    runs = SourceRuns(tokenizer, ())

    def add(text, tokens):
        event = Tokens(text, tuple(ids[i] for i in tokens), tuple(sources[i] for i in tokens))
        return [(run.text, run.source, run.tokens) for run in runs.add(event)]

    # The engine holds back what may begin a stop string, and incomplete characters.
    assert add("ab", (0, 1, 2)) == [("a", "model", 1), ("b", "n-gram", 1)]
    assert add("cd", (3, 4)) == [("c", "n-gram", 1), ("d", "early-exit", 1)]
    assert add("\u00e9", (5,)) == [("\u00e9", "n-gram", 2)]
    assert add("!", ()) == [("!", "model", 0)]
