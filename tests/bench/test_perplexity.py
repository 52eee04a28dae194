"""Perplexity against counts by hand: a model that finds every token equally likely, and formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip import LayerSkipModel
from layerskip.bench import perplexity as module
from layerskip.bench.perplexity import perplexity, windows
from layerskip.bench.quality import Score

TEXT = "To be, or not to be: that is the question."
VOCABULARY = 259


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32")


def test_without_knowledge_perplexity_is_the_vocabulary(model, monkeypatch):
    monkeypatch.setattr(
        model.decoder, "logits", lambda hidden: torch.zeros(*hidden.shape[:2], VOCABULARY)
    )
    metrics = perplexity(model, TEXT, [1, 4], window=16, stride=8)[4]
    assert metrics["token_perplexity"].value == pytest.approx(VOCABULARY)
    assert metrics["token_perplexity"].stderr == pytest.approx(0.0, abs=1e-3)
    assert metrics["bits_per_byte"].value == pytest.approx(math.log2(VOCABULARY))
    in_a_word = len(TEXT) / 10  # every byte is a token, and the text has ten words
    assert metrics["word_perplexity"].value == pytest.approx(VOCABULARY**in_a_word)
    assert metrics["token_accuracy"].value == 0.0  # the first of equals is <unk>


def test_exits_differ_and_windows_of_full_stride_are_the_sum_of_their_parts(model):
    found = perplexity(model, TEXT, [1, 2, 4], window=64, stride=64)
    values = [found[e]["token_perplexity"].value for e in (1, 2, 4)]
    assert len(set(values)) == 3
    assert found[4]["token_perplexity"].stderr is None  # one window
    ids = [1, *model.tokenizer.encode(TEXT)]
    with torch.inference_mode():
        cache = model.decoder.new_cache(len(ids))
        hidden = model.decoder.run(model.decoder.embed(torch.tensor([ids])), 0, 2, cache)
        logits = model.decoder.logits(hidden)[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert found[2]["token_perplexity"].value == pytest.approx(float(nats.exp()), rel=1e-4)


def test_standard_error_is_that_of_the_mean_over_windows():
    scores = [Score(-1.0, 1), Score(-3.0, 0)]
    metrics = module._metrics(scores, [1, 1], words=2, n_bytes=4)
    assert metrics["token_perplexity"].value == pytest.approx(math.exp(2))
    # Nats a token are 1 and 3: mean 2, standard error sqrt(2) / sqrt(2) = 1.
    assert metrics["token_perplexity"].stderr == pytest.approx(math.exp(2))
    assert metrics["bits_per_byte"].value == pytest.approx(4 / (4 * math.log(2)))
    assert metrics["bits_per_byte"].stderr == pytest.approx(2 / (4 * math.log(2)))
    assert (metrics["token_accuracy"].value, metrics["token_accuracy"].stderr) == (0.5, 0.5)


def test_too_large_to_say_is_null_in_json():
    metrics = module._metrics([Score(-2000.0, 0)], [1], words=1, n_bytes=1)
    assert metrics["token_perplexity"].to_dict() == {
        "value": None,
        "stderr": None,
        "higher_is_better": False,
    }


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_token_is_predicted_once_with_enough_before_it(n, window, data):
    stride = data.draw(st.integers(1, window))
    predicted = []
    for passage in windows(list(range(n)), window, stride):
        assert len(passage.tokens) <= window + 1
        for token in passage.tokens[len(passage.tokens) - passage.scored :]:
            predicted.append(token)
            before = token - passage.tokens[0]
            assert before >= min(token, window - stride + 1)
    assert predicted == list(range(1, n))


def test_window_is_held_to_the_context_and_bad_strides_are_refused(model):
    assert perplexity(model, TEXT * 20, [1], window=10_000, stride=300)
    with pytest.raises(ValueError, match="from 1 to the window of 512"):
        perplexity(model, TEXT, [1], window=10_000, stride=513)
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(model, "", [1])


def test_no_tokenizer_no_perplexity(model):
    bare = LayerSkipModel.__new__(LayerSkipModel)
    bare.decoder, bare.tokenizer = model.decoder, None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        perplexity(bare, TEXT, [1])
