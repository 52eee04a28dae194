"""Drafts from the text itself."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import LAYERS, PLAIN, ids, random_prompt, steps, tiny_decoder

from layerskip.decoding import Plan, Sampling
from layerskip.decoding.ngram import MAX_MATCH, MIN_MATCH, NgramIndex

SAMPLES = 1500


def ngram(draft_tokens, draft_from="n-gram", exit_layer=None):
    return Plan(
        mode="self-speculative",
        exit_layer=exit_layer,
        draft_tokens=draft_tokens,
        draft_from=draft_from,
    )


def reference(tokens, limit):
    """The longest suffix seen before, its latest earlier place, and what followed, with its period."""
    for n in range(min(MAX_MATCH, len(tokens)), MIN_MATCH - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                after = tokens[start + n :]
                return n, [after[i % len(after)] for i in range(limit)]
    return 0, []


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 12))
def test_it_proposes_what_followed_the_longest_latest_match(tokens, limit):
    assert NgramIndex(tokens).propose(limit) == reference(tokens, limit)


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(0, 20))
def test_growing_is_starting_with_all(tokens, cut):
    grown = NgramIndex(tokens[:cut])
    grown.extend(tokens[cut:])
    assert grown.propose(9) == NgramIndex(tokens).propose(9)


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, 9])
@pytest.mark.parametrize(
    ("draft_from", "exit_layer"), [("n-gram", None), ("both", 1), ("both", LAYERS)]
)
def test_greedy_is_plain(draft_tokens, draft_from, exit_layer):
    decoder = tiny_decoder("llama3.1")
    for seed in range(3):
        prompt = random_prompt(decoder, 6, seed) * 3
        plan = ngram(draft_tokens, draft_from, exit_layer)
        assert ids(decoder, prompt, plan, n=40) == ids(decoder, prompt, PLAIN, n=40)


def test_a_repeating_answer_is_drafted_and_sources_are_named():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 4) * 4
    sources = set()
    accepted = 0
    for step in steps(decoder, prompt, ngram(4, "both", 1), n=60):
        sources.add(step.source)
        accepted += step.accepted if step.source == "n-gram" else 0
    assert {"n-gram", "early-exit"} <= sources
    assert accepted > 0


def test_without_a_match_nothing_is_drafted():
    decoder = tiny_decoder("llama3.1")
    _first, second, *_ = steps(decoder, [1, 2, 3], ngram(4), n=3)
    assert (second.drafted, second.source) == (0, "model")


def test_sampled_tokens_have_the_models_distribution():
    """A certain draft is accepted with the probability that the model gives it."""
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 3) * 3
    sampling = Sampling(temperature=0.7, top_k=4)
    plain, drafted = (
        Counter(
            tuple(ids(decoder, prompt, plan, n=3, sampling=sampling, seed=seed))
            for seed in range(SAMPLES)
        )
        for plan in (PLAIN, ngram(2))
    )
    likely = [answer for answer, count in plain.items() if count >= 30]
    assert len(likely) > 3
    for answer in likely:
        share = plain[answer] / SAMPLES
        error = (2 * share * (1 - share) / SAMPLES) ** 0.5
        assert abs(plain[answer] - drafted[answer]) / SAMPLES < 5 * error
