"""Predicted outputs: a draft source that is aligned with the answer."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scripted import encode, scripted_model
from tiny_decoders import (
    FREE,
    PLAIN,
    ids,
    model_of,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
    tokens_of,
)

from layerskip.decoding import DecodingConfig, Draft
from layerskip.decoding import config as config_module
from layerskip.decoding.drafters import Prediction

ALONE = speculative(None, 6, draft_from="prediction")


def proposed(drafter, n=3, drafted=()):
    draft = Draft(torch.tensor([[0]]), SimpleNamespace(lengths=torch.zeros(1, dtype=torch.int64)))
    draft.token_ids += drafted
    return drafter.propose(draft, n).token_ids


def after(prediction, answer, n=3):
    """Return what a prediction proposes after an answer, given token by token."""
    drafter = Prediction(prediction)
    for token in answer:
        drafter.update([token])
    assert proposed(drafter, n) == proposed(Prediction(prediction), n, drafted=answer)
    return proposed(drafter, n)


TEXT = [*range(10, 30)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], [10, 11, 12]),
        (TEXT[:4], [14, 15, 16]),
        ([10, 11, 90], [13, 14, 15]),  # replaced: 90 for 12
        ([10, 11, 90, 91, 12, 13], [14, 15, 16]),  # inserted
        ([10, 11, 20, 21], [22, 23, 24]),  # left out
        ([10, 11, 12, 90, 11, 12], [13, 14, 15]),  # said again
        ([90, 91, 10, 11], [12, 13, 14]),  # begins with something else
        (TEXT, []),
        ([*TEXT, 90], []),
        ([90] * 40, []),
        ([*TEXT[:-1]], [29]),
    ],
)
def test_the_place_in_the_prediction_follows_the_answer(answer, expected):
    assert after(TEXT, answer) == expected


def test_the_longest_match_counts_and_of_equal_ones_the_nearest():
    near, far = [1, 2, 3], [1, 2, 4]
    text = [*near, *TEXT, *far, *TEXT, 9, *far]
    assert after(text, [50, 1, 2], 1) == [3]
    assert after(text, [*near, *TEXT[:-3], 50, 1, 2], 1) == [4]
    assert after(text, [50, 9, 1, 2], 1) == [4]
    assert after(text, [50, 9, 1, 2, 4], 1) == []


def test_confidence_grows_with_the_matches_in_a_row():
    drafter = Prediction(TEXT)
    draft = Draft(torch.tensor([[0]]), SimpleNamespace(lengths=torch.zeros(1, dtype=torch.int64)))
    first = drafter.propose(draft, 4).confidences
    assert sorted(set(first)) == first
    drafter.update(TEXT[:8])
    assert drafter.propose(draft, 4).confidences == [0.95] * 4
    drafter.update([90])
    assert drafter.propose(draft, 4).confidences == first


def test_a_prediction_ends_at_an_end_token():
    assert proposed(Prediction([5, 6, 7, 8], {7}), 4) == [5, 6, 7]


@pytest.mark.parametrize("empty", [(), (7,)])
def test_predictions_that_are_too_short_to_match(empty):
    assert after(empty, [3, 4, 5, 6]) == []


# --- in the loop --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder("llama3.1", upper=0.1)


@pytest.fixture(scope="module")
def prompt(decoder):
    return random_prompt(decoder, 8)


@pytest.fixture(scope="module")
def plain(decoder, prompt):
    return ids(decoder, prompt, PLAIN, n=60)


def test_the_whole_answer_takes_few_rounds(decoder, prompt, plain):
    rounds = steps(decoder, prompt, ALONE, n=60, prediction=tuple(plain))
    assert tokens_of(rounds) == plain
    assert len(rounds) <= 1 + 60 / 6
    assert all(step.accepted == step.drafted for step in rounds)


@pytest.mark.parametrize("draft_from", ["prediction", "prediction+n-gram", "prediction+both"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_every_prediction_is_exact(decoder, prompt, draft_from, adaptive, penalty):
    plain = ids(decoder, prompt, PLAIN, n=60, repetition_penalty=penalty)
    exit_layer = 1 if "both" in draft_from else None
    config = speculative(exit_layer, 6, draft_from=draft_from, adaptive=adaptive)
    for prediction in (
        plain,
        [*plain, *plain[::-1]],  # longer than the answer
        [*plain[:20], *plain[30:]],
        [*plain[:20], 1, 2, 3, *plain[20:]],
        [t if i % 7 else 5 for i, t in enumerate(plain)],
        [(t + 1) % 90 for t in plain],  # nothing of it is right
        plain[:1],
    ):
        changes = {"prediction": tuple(prediction), "repetition_penalty": penalty}
        assert ids(decoder, prompt, config, n=60, **changes) == plain


def test_after_a_deviation_it_finds_its_place_again(decoder, prompt, plain):
    for prediction in (
        [*plain[:20], *plain[30:]],
        [*plain[:20], 1, 2, 3, *plain[20:]],
        [*plain[:20], (plain[20] + 1) % 90, *plain[21:]],
    ):
        rounds = steps(decoder, prompt, ALONE, n=60, prediction=tuple(prediction))
        accepted = sum(step.sources[: step.accepted].count("prediction") for step in rounds)
        assert accepted >= 35
        assert any(step.rejected for step in rounds)


def test_accepted_and_rejected_tokens_can_be_counted(decoder, prompt, plain):
    changed = (*plain[:10], (plain[10] + 1) % 90, *plain[11:])
    config = speculative(None, 8, draft_from="prediction+n-gram", adaptive=True)
    rounds = steps(decoder, prompt, config, n=60, measured=FREE, prediction=changed)
    accepted = Counter(s for step in rounds for s in step.sources[: step.accepted])
    drafted = Counter(s for step in rounds for s in step.sources)
    assert accepted["prediction"] >= 30
    assert drafted["prediction"] > accepted["prediction"]


def test_nothing_is_drafted_beyond_an_end_token(decoder, prompt, plain):
    end = plain[12]
    cut = plain[: plain.index(end) + 1]
    rounds = steps(decoder, prompt, ALONE, n=60, prediction=tuple(plain), eos_token_ids={end})
    assert tokens_of(rounds) == cut
    assert rounds[-1].drafted == rounds[-1].accepted


def test_a_wrong_prediction_is_paused(decoder, prompt, plain):
    config = speculative(None, 6, draft_from="prediction", adaptive=True)
    wrong = tuple((t + 1) % 90 for t in plain)
    rounds = steps(decoder, prompt, config, n=60, prediction=wrong)
    drafted = [step.drafted for step in rounds]
    assert sum(map(bool, drafted[-40:])) <= 6


# --- options ------------------------------------------------------------------------------------


def test_a_prediction_is_drafted_from_beside_the_other_sources():
    def sources(**options):
        settings = dataclasses.replace(model_of(tiny_decoder("llama3.1")).settings, exit_layer=exit)
        model = model_of(tiny_decoder("llama3.1")).with_settings(settings)
        config = model.resolve(prediction=(5, 6), **options)
        assert model.resolve(config) == config
        return config.draft_from

    exit = None
    assert sources() == "prediction+n-gram"
    assert sources(draft_from="prediction") == "prediction"
    assert sources(mode="self-speculative") == "prediction+early-exit"
    exit = 2
    assert sources() == "prediction+both"
    assert sources(draft_from="n-gram") == "prediction+n-gram"


def test_an_empty_prediction_is_none():
    model = model_of(tiny_decoder("llama3.1"))
    for empty in ("", (), None):
        assert model.resolve(prediction=empty) == model.resolve()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "plain", "prediction": (5,)}, "plain decoding drafts nothing"),
        ({"mode": "early-exit", "prediction": (5,)}, "early exit drafts nothing"),
        ({"prediction": (1.5,)}, "has to be an integer"),
        ({"prediction": 7}, "has to be token ids"),
        ({"prediction": "x" * 101}, "101 characters or tokens, the limit is 100"),
        ({"prediction": (1,) * 101}, "101 characters or tokens, the limit is 100"),
    ],
)
def test_predictions_that_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(config_module, "MAX_PREDICTION", 100)
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**options)


def test_a_model_refuses_predictions_that_it_cannot_use():
    with pytest.raises(ValueError, match="there is no prediction to draft from"):
        model_of(tiny_decoder("llama3.1")).resolve(draft_from="prediction")
    with pytest.raises(ValueError, match="a prediction has to be a text, or token ids of 0 to"):
        model_of(tiny_decoder("llama3.1")).resolve(prediction=(10**6,))
    with pytest.raises(ValueError, match="no tokenizer; give the prediction as token ids"):
        model_of(tiny_decoder("llama3.1")).resolve(prediction="ab")


def test_a_text_is_tokenized():
    assert scripted_model([1]).resolve(prediction="ab").prediction == tuple(encode("ab"))


def test_a_list_of_prompts_is_answered_one_after_the_other(decoder, prompt, plain):
    model, prompts = model_of(decoder), [prompt, prompt[:5]]
    answers = model.generate(prompts, prediction=plain, max_new_tokens=60)
    assert [a.token_ids for a in answers] == [ids(decoder, p, PLAIN, n=60) for p in prompts]
    assert answers[0].mode == "prediction+n-gram"
