"""All parts of mode auto together: the answers of plain decoding, for every combination."""

import itertools
from collections import Counter

import pytest
from tiny_decoders import LAYERS, PLAIN, ids, random_prompt, speculative, steps, tiny_decoder

from layerskip.decoding import Sampling

SAMPLES = 1500


def combined(exit_layer=1, draft_from="both", adaptive=True, vocabulary=tuple(range(30)), d=12):
    return speculative(
        None if draft_from == "n-gram" else exit_layer,
        draft_tokens=d,
        draft_from=draft_from,
        adaptive=adaptive,
        draft_vocabulary=None if draft_from == "n-gram" else vocabulary,
    )


@pytest.mark.parametrize("draft_from", ["early-exit", "n-gram", "both"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("vocabulary", [None, tuple(range(30))], ids=["all", "short"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_plain(draft_from, adaptive, vocabulary, penalty):
    decoder, sampling = tiny_decoder("llama3.1", upper=0.1), Sampling(repetition_penalty=penalty)
    for seed, exit_layer in itertools.product(range(2), (1, LAYERS)):
        prompt = random_prompt(decoder, 5, seed) * 2
        plan = combined(exit_layer, draft_from, adaptive, vocabulary, d=6)
        plain = ids(decoder, prompt, PLAIN, n=40, sampling=sampling)
        assert ids(decoder, prompt, plan, n=40, sampling=sampling) == plain


def test_both_sources_draft_and_some_drafts_stand():
    decoder = tiny_decoder("llama3.1", upper=0.02)
    accepted = Counter()
    for seed in range(4):
        for step in steps(decoder, random_prompt(decoder, 5, seed) * 2, combined(), n=60):
            accepted[step.source] += step.accepted
    assert accepted["early-exit"] > 0
    assert accepted["n-gram"] > 0


def test_a_round_without_a_draft_is_one_plain_pass(monkeypatch):
    decoder = tiny_decoder("llama3.1")
    run, passes = decoder.run, []

    def watched(hidden, start, stop, cache):
        passes.append((hidden.shape[1], start, stop))
        return run(hidden, start, stop, cache)

    monkeypatch.setattr(decoder, "run", watched)
    found = steps(decoder, [1, 2, 3], combined(draft_from="n-gram"), n=4)
    assert [step.source for step in found] == ["model"] * 4
    assert passes[1:] == [(1, 0, LAYERS)] * 3
