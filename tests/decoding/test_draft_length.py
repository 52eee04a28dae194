"""Where a draft ends by itself, with costs and acceptance that can be followed by hand."""

import pytest
import torch
from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.draft_length import DraftLength, NgramLength, by_match, by_share
from layerskip.decoding.pace import Pace
from tiny_decoders import (
    LAYERS,
    PLAIN,
    counted,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
)

from layerskip.decoding import Sampling
from layerskip.decoding.drafters import EarlyExitDrafter

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


def test_a_dear_second_position_is_drafted_where_further_ones_are_cheap():
    """A chance of 0.95 is not worth 1.03 alone, but 0.95 and 0.95 x 0.8 are worth 1.03 and 0.3."""
    blocks = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.92, 1.92, 1.92, 1.92))
    assert drafted(DraftLength(blocks, trained=True), [0.95] * 4) == 4
    # One that drafts a single token until one is right cannot count on more.
    assert drafted(DraftLength(blocks), [0.95] * 4) == 0
    # Nor can one on more than the round has room for.
    short = DraftLength(blocks, trained=True)
    assert short.begins(1)
    assert not short.keeps(0.95)
    # Nor does a dear position pay where the next ones are dear too.
    slope = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.92, 2.84, 3.76))
    assert drafted(DraftLength(slope, trained=True), [0.95] * 4) == 0


def test_a_confidence_that_is_too_low_is_found_out_by_what_was_refused():
    """0.15 of a token's chance is not worth 0.2, until it is seen to be right whenever it is asked."""

    def kept_after(rounds, refused_was_right):
        length = DraftLength(CHEAP)
        for _ in range(rounds):
            assert drafted(length, [0.15]) == 0
            length.learn(0, refused_was_right)
            while length.rests:
                length.begins()
        return drafted(length, [0.15])

    assert kept_after(1, refused_was_right=True) == 1
    assert kept_after(9, refused_was_right=None) == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_a_refused_token_is_compared_with_the_models_own(sampling):
    """Where the answer is sampled, another token says little of whether this one would have stood."""
    decoder, told, last = tiny_decoder("llama3.1"), [], torch.tensor([[3]])

    class Unsure(DraftLength):
        keeps = staticmethod(lambda confidence: False)

        def learn(self, accepted, refused_was_right=None):
            told.append(refused_was_right)

    drafter = EarlyExitDrafter(decoder, 1, sampling, length=Unsure(CHEAP))
    generator = torch.Generator().manual_seed(0)
    drafter.draft(last, 4, decoder.new_cache(8), None, generator)
    (refused,) = drafter._refused
    if sampling.greedy:
        assert [refused] == decoder.draft(last, 1, 1, decoder.new_cache(8))[1].tolist()[0]
    for token in (refused, refused + 1):
        drafter.settle([token], 0)
    assert told == ([True, False] if sampling.greedy else [None, None])


def test_what_it_once_gained_is_not_all_lost_again():
    """Sixty good rounds gain far more than eight tokens; no more than these, and a round, are lost."""
    length, lost = DraftLength(CHEAP, trained=True), 0.0
    for _ in range(60):
        length.learn(drafted(length, [0.95] * 12))
    while not length.rests:
        kept = drafted(length, [0.95] * 12)
        length.learn(0)
        lost += CHEAP.round(kept, kept) - 1
    assert lost <= 8 + CHEAP.round(12, 12)


def test_where_drafting_pays_it_drafts_further():
    length = DraftLength(CHEAP)
    for _ in range(50):
        kept = drafted(length, [0.95] * 12)
        length.learn(kept)
    assert kept >= 10


def test_nothing_but_one_token_is_risked_before_the_first_is_right():
    length = DraftLength(CHEAP)
    assert length.begins()
    assert not length.ends
    assert length.keeps(0.95)
    assert length.ends
    length.learn(1)
    assert length.begins()
    assert length.keeps(0.95)
    assert not length.ends


def test_an_exit_that_was_trained_to_draft_goes_on_while_it_is_sure():
    """0.95, 0.90, 0.86, 0.81 and then 0.77 are the chances that all are right."""

    def first_draft(confidence, **options):
        length, kept = DraftLength(CHEAP, **options), 0
        assert length.begins()
        while not length.ends and length.keeps(confidence):
            kept += 1
        return kept

    assert first_draft(0.95, trained=True) == 5
    assert first_draft(0.85, trained=True) == 2
    assert first_draft(0.75, trained=True) == 1
    assert first_draft(0.95) == 1


# Each position beyond the first adds 0.1 to a pass.
ROWS = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.1))


def test_a_long_match_is_drafted_further_than_a_short_one():
    """After two tokens 0.3, then 0.4, 0.5: products 0.3, 0.12, 0.06, and the third is under 0.1."""
    assert NgramLength(ROWS, Pace()).choose(by_match(2, 9)) == 2
    # After five: 0.6, 0.42, 0.34, 0.27, 0.21, 0.17, 0.14, 0.11, 0.09.
    assert NgramLength(ROWS, Pace()).choose(by_match(5, 12)) == 8
    assert NgramLength(ROWS, Pace()).choose(by_match(5, 3)) == 3


def test_what_brings_more_goes_first():
    """Two tokens after a match of two bring 1 + 0.3 + 0.12 - 1.2 = 0.22."""
    assert NgramLength(ROWS, Pace()).choose(by_match(2, 9), rival=0.21) == 2
    assert NgramLength(ROWS, Pace()).choose(by_match(2, 9), rival=0.23) == 0


def test_dear_positions_are_not_spent_on_n_grams():
    dear = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 2.0))
    assert NgramLength(dear, Pace()).choose(by_match(5, 12)) == 0
    # Four positions at the price of two: worth it together, though the first alone is not.
    blocks = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 2.0, 2.0, 2.0, 3.0))
    assert NgramLength(blocks, Pace()).choose(by_match(5, 12)) == 3


def test_a_token_of_a_draft_text_is_believed_a_little_less_often_than_it_came_next():
    """0.93, 0.86, 0.79 and so on are worth 0.1; a share of 0.05 is not."""
    length = NgramLength(ROWS, Pace())
    assert length.choose(by_share([0.99] * 5)) == 5
    assert length.choose(by_share([0.99, 0.01, 0.99])) == 1
    assert length.expected(by_share([0.99, 0.49])) == pytest.approx(0.95**1.5 * (1 + 0.45**1.5))
    before = length.expected(by_share([0.99]))
    length.choose(by_share([0.99]))
    length.judge(0, settled=1)
    assert length.expected(by_share([0.99])) < before
    assert length.expected(by_match(5, 1)) == pytest.approx(0.6)  # which is another matter


def chosen(length, match, right):
    """Whether a token after such a match is drafted; it is judged by whether it was right, anyway."""
    drafted = length.choose(by_match(match, 1))
    length.judge(right, settled=1)
    length.learn(right)
    return drafted == 1


def test_n_grams_learn_by_the_length_of_the_match_drafted_or_not():
    """0.6 of 2 were right at first. Four misses later 0.6 of 6 is not worth 0.1; one hit, and it is."""
    length = NgramLength(ROWS, Pace())
    for _ in range(4):
        chosen(length, 2, right=0)
    assert length.expected(by_match(2, 1)) == pytest.approx(0.6 / 6)
    while length._rests.resting:
        length._rests.begins()
    assert not chosen(length, 2, right=1)
    assert length.expected(by_match(2, 1)) == pytest.approx(1.6 / 7)
    assert chosen(length, 2, right=1)
    assert any(chosen(length, 4, right=0) for _ in range(200))


def proven(most=12):
    """A draft after one that was right: one token with a chance of 0.95 and more is kept."""
    length = DraftLength(ROWS)
    drafted(length, [0.95])
    length.learn(1)
    assert length.begins(most)
    assert length.keeps(0.95)
    return length


def test_likely_tokens_follow_a_draft_while_each_is_worth_its_row():
    """A row costs 0.1 of a step, whose time is worth 0.1 tokens and a little more."""
    assert proven().follow([0.95, 0.95, 0.3, 0.3, 0.3]) == 3  # products 0.91, 0.87, 0.26, 0.08
    assert proven().follow([0.05, 0.9]) == 0


def test_drafting_on_goes_first_where_it_promises_more():
    """A token brings 1.14 in its time's worth: drafting on 0.96 x 0.87 - 0.33, a row 0.11."""
    assert proven(most=2).follow([0.6]) == 0  # 0.96 x 0.6 - 0.11
    assert proven(most=2).follow([0.7]) == 1


def test_one_that_follows_for_sure_does_not_end_a_draft_that_would_go_on():
    """Drafting on brings 1.7 tokens beyond its time in all, each that follows at most 0.84."""
    assert proven().follow([0.99]) == 0
    assert proven().follow([0.99] * 3) == 3


def test_a_text_stands_between_an_exits_tokens_where_it_is_about_as_sure():
    """The exit is thought right in 87 of 100 places, and each of its tokens costs 0.2 of a step."""
    length = proven()
    assert length.instead([0.95, 0.9, 0.3, 0.99]) == 2
    assert length.drafted == 3
    assert proven().instead([0.5]) == 0
    assert proven(most=2).instead([0.99] * 5) == 1  # one token is drafted already
    dear = DraftLength(DraftCosts(layers=0.0, head=0.0, passes=(1.0, 9.0)))
    dear._proven = True
    assert dear.begins()
    assert dear.instead([0.99]) == 0  # its row costs more than it brings


def test_what_stands_between_is_no_experience_of_the_exit():
    length = proven()
    judged = sum(length._judged)
    assert length.instead([0.99, 0.99]) == 2
    length.learn(3)
    assert sum(length._judged) == judged + 1


def test_n_grams_between_are_judged_where_what_stands_before_them_was_right():
    ngrams, sure = NgramLength(ROWS, Pace()), by_share([0.99])
    for accepted, is_judged in ((0, False), (3, True), (1, True)):
        assert ngrams.instead(sure * 2, proven()) == 2
        before = list(ngrams._judged)
        ngrams.learn_behind(accepted)
        assert (ngrams._judged != before) == is_judged
    right = ngrams.expected(sure)
    for _ in range(2):  # told once, they are not judged again
        ngrams.learn_behind(1)
    assert ngrams.expected(sure) == right


def test_a_draft_ends_where_one_more_would_not_pay_if_it_were_right_as_often_as_others():
    """Of drafts half are right: 0.48 of a token for 0.5 of a step is not scored, for 0.3 it is."""

    def goes_on(layers):
        length = DraftLength(DraftCosts(layers=layers, head=0.1, passes=(1.0,)), trained=True)
        length._right, length._seen = 50.0, 100.0
        drafted(length, [0.95])
        return not length.ends

    assert goes_on(0.2)
    assert not goes_on(0.4)


def test_what_followed_is_paid_for_and_learned():
    followed, rates = [], []
    length = DraftLength(ROWS, pace := Pace())
    ngrams = NgramLength(ROWS, pace)
    for _ in range(8):
        drafted(length, [0.95])
        followed.append(ngrams.follow(by_match(7, 8), length))
        length.learn(1)  # the draft was right, what followed was not
        ngrams.learn_behind(1)
        rates.append(pace.rate)
    assert followed[:2] == [0, 8]
    assert followed[-1] == 0
    alone = DraftLength(ROWS, without := Pace())
    for _ in range(8):
        drafted(alone, [0.95])
        alone.learn(1)
    assert rates[-1] < without.rate


def test_nothing_follows_before_a_draft_was_ever_right():
    length = DraftLength(ROWS)
    assert length.begins()
    assert length.keeps(0.95)
    assert length.follow([0.99, 0.99]) == 0


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("confidence", [0.35, 0.65, 0.95])
@pytest.mark.parametrize(
    "costs",
    [
        DraftCosts(layers=0.13, head=0.02, passes=(1.0, 1.05)),  # exit 4 of 30, short head
        DraftCosts(layers=0.27, head=0.21, passes=(1.0, 1.05)),  # exit 8 of 30, whole head
        DraftCosts(layers=0.4, head=0.21, passes=(1.0, 1.3)),  # exit 15 of 30, 4 bits
        DraftCosts(layers=0.13, head=0.02, passes=(1.0, 2.0, 1.5, 1.4)),  # float32
    ],
)
def test_a_drafter_that_is_always_wrong_costs_at_most_three_in_a_hundred(
    costs, confidence, trained
):
    """Early exit and n-grams together, a match of five at every third token, 200 tokens."""
    pace = Pace()
    early, ngrams = DraftLength(costs, pace, trained), NgramLength(costs, pace)
    time = 0.0
    for i in range(200):
        drafted = ngrams.choose(by_match(5, 8) if i % 3 == 0 else [], early.gain)
        ngrams.judge(0, settled=1)
        if drafted:
            ngrams.learn(0)
            time += costs.over(drafted + 1)
            continue
        scored = kept = 0
        if early.begins():
            while kept < 12 and not early.ends:
                scored += 1
                if not early.keeps(confidence):
                    break
                kept += 1
        early.learn(0, refused_was_right=False if scored > kept == 0 else None)
        time += costs.round(kept, scored) if scored else 1.0
    # One that was trained to draft is believed where it is sure, and may risk a long draft at once.
    assert time <= (1.04 if trained else 1.03) * 200


def adaptive(exit_layer, draft_from="early-exit"):
    return speculative(exit_layer, draft_tokens=12, draft_from=draft_from, adaptive=True)


@pytest.mark.parametrize("draft_from", ["early-exit", "both"])
@pytest.mark.parametrize("exit_layer", [1, LAYERS])
@pytest.mark.parametrize("upper", [0.02, 0.3])
def test_greedy_is_plain(exit_layer, draft_from, upper):
    decoder = tiny_decoder("llama3.1", upper=upper)
    for seed in range(3):
        prompt = random_prompt(decoder, 7, seed)
        plan = adaptive(exit_layer, draft_from)
        assert ids(decoder, prompt, plan, n=40) == ids(decoder, prompt, PLAIN, n=40)


@pytest.mark.parametrize("draft_from", ["early-exit", "both"])
def test_costs_follow_the_context(draft_from, monkeypatch):
    contexts = counted(monkeypatch)
    decoder = tiny_decoder("llama3.1")
    ids(decoder, random_prompt(decoder, 7), adaptive(1, draft_from), n=100)
    assert contexts[0] == [7]
    assert len(contexts) == 2
    assert contexts[1][0] >= 7 + 64


def test_lengths_differ_and_sampling_works():
    decoder = tiny_decoder("llama3.1", upper=0.02)
    sampling = Sampling(temperature=0.5)
    made = steps(decoder, random_prompt(decoder, 7), adaptive(1), n=60, sampling=sampling, seed=0)
    assert len({step.drafted for step in made}) > 1
