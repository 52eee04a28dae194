"""Where a draft ends by itself, with costs and acceptance that can be followed by hand."""

import pytest
from tiny_decoders import LAYERS, PLAIN, ids, random_prompt, steps, tiny_decoder

from layerskip.decoding import Plan, Sampling
from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.draft_length import DraftLength, NgramLength, Pace

CHEAP = DraftCosts(layers=0.1, head=0.1, passes=(1.0,))


def drafted(length, confidences):
    """How many of the offered tokens are kept."""
    assert length.begins()
    kept = 0
    for confidence in confidences:
        if not length.keeps(confidence):
            break
        kept += 1
    return kept


def test_it_goes_on_while_the_chance_is_worth_the_cost():
    # One token a step at first, so a token has to survive with a chance of 0.2 or more.
    # Confidence 0.55 is believed: 0.55, 0.30, 0.166.
    assert drafted(DraftLength(CHEAP), [0.55] * 9) == 2


def test_it_learns_that_confidence_is_misplaced():
    length = DraftLength(CHEAP)
    assert drafted(length, [0.95]) == 1
    for _ in range(2000):  # it rests between its tries
        if length.begins():
            length.keeps(0.95)
            length.learn(0)
    while not length.begins():
        pass
    assert not length.keeps(0.95)


def test_it_rests_where_drafting_does_not_pay_and_longer_each_time():
    length = DraftLength(CHEAP)
    rests = []
    for _ in range(3):
        drafted(length, [0.95])
        length.learn(0)
        rests.append(0)
        while not length.begins():
            rests[-1] += 1
    assert rests == [4, 8, 16]


def test_where_drafting_pays_it_drafts_further():
    length = DraftLength(CHEAP)
    for _ in range(50):
        kept = drafted(length, [0.95] * 12)
        length.learn(kept)
    assert kept >= 10


def adaptive(exit_layer, draft_from="early-exit"):
    return Plan(
        mode="self-speculative",
        exit_layer=exit_layer,
        draft_tokens=12,
        draft_from=draft_from,
        adaptive=True,
    )


@pytest.mark.parametrize("draft_from", ["early-exit", "both"])
@pytest.mark.parametrize("exit_layer", [1, LAYERS])
@pytest.mark.parametrize("upper", [0.02, 0.3])
def test_greedy_is_plain(exit_layer, draft_from, upper):
    decoder = tiny_decoder("llama3.1", upper=upper)
    for seed in range(3):
        prompt = random_prompt(decoder, 7, seed)
        plan = adaptive(exit_layer, draft_from)
        assert ids(decoder, prompt, plan, n=40) == ids(decoder, prompt, PLAIN, n=40)


def test_lengths_differ_and_sampling_works():
    decoder = tiny_decoder("llama3.1", upper=0.02)
    sampling = Sampling(temperature=0.5)
    made = steps(decoder, random_prompt(decoder, 7), adaptive(1), n=60, sampling=sampling, seed=0)
    assert len({step.drafted for step in made}) > 1
