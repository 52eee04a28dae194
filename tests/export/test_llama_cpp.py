"""Tiny models and tokenizers of every kind in llama.cpp itself."""

import pytest
import torch
from llama_server import Llama
from tiny_tokenizers import (
    LLAMA3,
    SPLITS,
    TEXTS,
    byte_level,
    checkpoint,
    sentencepiece,
    split,
    whole_words,
)

import tiny_models
from layerskip.export import open_source, to_gguf

pytest.importorskip("xllamacpp")


@pytest.fixture
def opened(tmp_path):
    """Export a checkpoint folder in float32 and open it in llama.cpp."""

    def open_(folder, exit_layer=None):
        to_gguf(open_source(folder, exit_layer), tmp_path / "m.gguf", weights="f32")
        return Llama(tmp_path / "m.gguf", n_ctx=64, exact=True)

    return open_


@pytest.mark.parametrize(
    ("case", "exit_layer"),
    [
        ("llama3.2", None),
        ("llama3.2", 2),
        ("llama-linear", None),
        ("llama-biases", None),
        ("mistral", None),
        ("qwen2-tied", None),
        ("qwen3", None),
    ],
)
def test_logits_are_ours(case, exit_layer, opened, ours, tmp_path):
    wrapped = checkpoint(tmp_path, byte_level(SPLITS["gpt-2"]))
    rows = len(wrapped) + 8  # transformers adds a token of its own to tokenizers of Qwen2
    tiny_models.build(case, vocab_size=rows).save_pretrained(tmp_path)
    n = 5 if case == "mistral" else 40  # its window, which llama.cpp does not have
    tokens = torch.randint(len(wrapped), (n,), generator=torch.Generator().manual_seed(1))
    found = opened(tmp_path, exit_layer).log_probs(tokens.tolist(), rows)
    expected = ours(tmp_path, tokens, exit_layer).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece", "sentencepiece without a prefix"])
def test_tokens_are_those_of_transformers(name, opened, tmp_path):
    if name in SPLITS:
        wrapped = checkpoint(tmp_path, byte_level(SPLITS[name]))
    else:
        prefix = name == "sentencepiece"
        wrapped = checkpoint(tmp_path, sentencepiece(prefix=prefix), unk_token="<unk>")
    same_tokens(opened(tmp_path), wrapped)


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_words_that_are_tokens_are_merged_or_not_as_before(ignore_merges, opened, tmp_path):
    wrapped = checkpoint(tmp_path, whole_words(split(LLAMA3), ignore_merges))
    same_tokens(opened(tmp_path), wrapped)


def same_tokens(model, wrapped):
    for text in TEXTS:
        assert model.tokenize(text) == wrapped.encode(text)
