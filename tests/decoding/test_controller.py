"""Decisions of the controllers, and what rounds cost, with numbers that can be followed by hand."""

import dataclasses

import pytest
import torch
from scripted import ScriptedDecoder, scripted_model
from tiny_decoders import LAYERS, tiny_decoder

from layerskip.decoding import Candidate, Draft, controller
from layerskip.decoding.controller import (
    BACKOFF_ROUNDS,
    MAX_BACKOFF_ROUNDS,
    Acceptance,
    Backoff,
    ContextCosts,
    DraftController,
    DraftCosts,
    FixedController,
    Throughput,
)
from layerskip.model import StepCosts
from layerskip.model.exit_adapter import AcceptanceCounts
from layerskip.model.step_timing import PassCosts

END = 9
# A token of the exit costs 0.2; more positions cost nothing, or 0.1 each.
CHEAP = DraftCosts(layers=0.1, head=0.1, passes=(1.0,))
ROWS = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.1))


class StubExit:
    """Proposes token 7 with given confidences, one after the other; the last one is repeated."""

    name, num_layers, head_share = "early-exit", 1, 1.0

    def __init__(self, *confidences, token=7, prior=None):
        self.confidences, self.token, self.prior = confidences, token, prior

    def propose(self, draft, max_tokens):
        confidence = self.confidences[min(len(draft), len(self.confidences) - 1)]
        return Candidate(torch.tensor([[self.token]] * len(draft.last)), [confidence])


class StubLookup:
    """Proposes tokens with given confidences."""

    num_layers, head_share, prior = 0, 0.0, None

    def __init__(self, *confidences, tokens=None, name="n-gram"):
        self.name, self.confidences = name, list(confidences)
        self.tokens = tokens or [7] * len(confidences)

    def propose(self, draft, max_tokens):
        confidences = self.confidences[:max_tokens]
        return Candidate(torch.tensor([self.tokens[:max_tokens]], dtype=torch.int64), confidences)


class ConstantCosts:
    def __init__(self, costs):
        self.costs = costs

    def at(self, *contexts):
        return self.costs


class Rounds:
    """Plays rounds of a controller against a script."""

    def __init__(self, costs, *drafters, greedy=True):
        options = {"greedy": greedy, "eos_token_ids": (END,)}
        self.controller = DraftController(drafters, ConstantCosts(costs), **options)
        self.costs, self.time = costs, 0.0

    def play(self, accepted=99, max_tokens=12, target=8):
        """Fill a draft, accept the first tokens of it, and commit the model's own after them."""
        cache = ScriptedDecoder([1]).new_cache(64)
        draft = Draft(torch.tensor([[0]]), cache, [0])
        self.controller.fill(draft, max_tokens)
        n = min(accepted, len(draft))
        self.controller.update(draft, (*draft.tokens[0, :n].tolist(), target), n)
        exits = draft.sources.count("early-exit")
        self.time += self.costs.round(len(draft), exits + draft.discarded, len(draft) - exits)
        return draft


def drafted(costs, *drafters, **options):
    """Return the sources of a first draft."""
    return Rounds(costs, *drafters).play(**options).sources


# --- the first draft ----------------------------------------------------------------------------


def test_the_exit_drafts_while_a_token_is_worth_its_cost():
    """0.55 is accepted with 0.55, then 0.30 and 0.17; a fourth one with 0.17 x 0.8 < 0.2."""
    assert len(drafted(CHEAP, StubExit(0.55))) == 3
    assert len(drafted(CHEAP, StubExit(0.55), max_tokens=2)) == 2
    assert len(drafted(CHEAP, StubExit(0.95))) == 12


def test_a_token_of_low_confidence_is_discarded():
    """Its head is paid for: 0.05 is not worth the other 0.1, but 0.15 is."""
    draft = Rounds(CHEAP, StubExit(0.05)).play()
    assert (draft.sources, draft.discarded) == ([], 1)
    assert len(drafted(CHEAP, StubExit(0.95, 0.95, 0.05))) == 2
    assert len(drafted(CHEAP, StubExit(0.15))) == 1


def test_a_dear_position_is_drafted_where_the_next_ones_are_cheap():
    """0.8 is not worth 1.03 alone, but it is with what may follow for 0.2 each."""
    blocks = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.92, 1.92, 1.92, 1.92))
    assert len(drafted(blocks, StubExit(0.95))) == 12
    assert drafted(blocks, StubExit(0.95), max_tokens=1) == []  # no room for more
    slope = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.92, 2.84, 3.76))
    assert drafted(slope, StubExit(0.95)) == []


def test_look_ups_draft_their_best_prefix():
    """0.35 + 0.16 is worth two rows of 0.1, the third token adds 0.09."""
    assert len(drafted(ROWS, StubLookup(0.3, 0.4, 0.5))) == 2
    assert len(drafted(ROWS, StubLookup(0.6, 0.7, 0.8, *[0.8] * 20))) > 6
    dear = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 2.0))
    assert drafted(dear, StubLookup(*[0.8] * 9)) == []
    # Four positions at the price of two are worth it together, though the first alone is not.
    blocks = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 2.0, 2.0, 2.0, 3.0))
    assert len(drafted(blocks, StubLookup(*[0.8] * 9))) == 3


def test_the_most_valuable_source_drafts():
    confident, vague = StubLookup(0.9, 0.9), StubLookup(0.3, 0.3, name="datastore")
    assert drafted(ROWS, vague, confident) == ["n-gram", "n-gram"]
    assert drafted(ROWS, vague) == ["datastore"] * 2
    # The exit goes first where it promises more, and goes on behind a look-up.
    assert drafted(CHEAP, vague, StubExit(0.95)) == ["early-exit"] * 12
    sources = drafted(ROWS, confident, StubExit(0.95), max_tokens=4)
    assert sources[:2] == ["n-gram", "n-gram"]


def test_nothing_is_drafted_behind_an_end_token():
    assert drafted(CHEAP, StubExit(0.95, token=END)) == ["early-exit"]
    lookup = StubLookup(0.9, 0.9, tokens=[7, END])
    assert drafted(ROWS, lookup, StubExit(0.95)) == ["n-gram", "n-gram"]


# --- what is learned ----------------------------------------------------------------------------


def test_confidence_is_a_prior_that_verified_tokens_replace():
    acceptance = Acceptance()
    assert acceptance.of("n-gram", 0.3) == pytest.approx(0.35)
    acceptance.update("n-gram", 0.3, accepted=True)
    assert acceptance.of("n-gram", 0.39) == pytest.approx((3 * 0.35 + 1) / 4)
    assert acceptance.of("n-gram", 0.4) == pytest.approx(0.45)
    assert acceptance.of("datastore", 0.3) == pytest.approx(0.35)
    for confidence, mean in ((1.0, 0.95), (0.0, 0.05), (float("nan"), 0.05)):
        assert acceptance.of("early-exit", confidence) == pytest.approx(mean)


def counts_of(**by_bin):
    """Return measured counts, such as `b2=(accepted, verified)` of the bin from 0.2 to 0.3."""
    pairs = [by_bin.get(f"b{i}", (0, 0)) for i in range(10)]
    accepted, verified = zip(*pairs, strict=True)
    return AcceptanceCounts(accepted=accepted, verified=verified)


def test_a_drafter_brings_its_own_prior():
    acceptance = Acceptance([StubExit(0.5, prior=counts_of(b2=(300, 1000), b9=(700, 1000)))])
    assert acceptance.exit_mean == pytest.approx(0.5)
    assert acceptance.of("early-exit", 0.95) == pytest.approx(0.7, abs=0.01)
    assert acceptance.of("early-exit", 0.25) == pytest.approx(0.3, abs=0.01)
    assert acceptance.of("early-exit", 0.55) == pytest.approx(0.55)  # unmeasured
    assert acceptance.of("n-gram", 0.95) == pytest.approx(0.95)


def test_a_prior_decides_whether_the_exit_drafts_at_all():
    """A token costs 0.1 to propose and 0.4 to keep: a mean of 0.6 is worth it, of 0.4 is not."""
    costs = DraftCosts(layers=0.1, head=0.1, passes=(1.0, 1.0 + 0.3 / 0.9))
    for mean, expected in ((0.6, ["early-exit"]), (0.4, [])):
        prior = counts_of(b9=(round(1000 * mean), 1000))
        assert drafted(costs, StubExit(0.95, prior=prior), max_tokens=1) == expected


def test_the_controller_learns_that_confidence_is_misplaced():
    rounds = Rounds(CHEAP, StubExit(0.95))
    lengths = [len(rounds.play(accepted=0)) for _ in range(300)]
    assert lengths[0] == 12
    assert max(lengths[-100:]) <= 1


def test_the_controller_learns_that_vague_drafts_are_right():
    rounds = Rounds(CHEAP, StubExit(0.55))
    lengths = [len(rounds.play()) for _ in range(60)]
    assert lengths[0] == 3
    assert lengths[-1] == 12


def test_an_undrafted_proposal_is_judged_by_the_committed_tokens():
    """A row costs 0.4: more than 0.35, less than the 0.51 after one proposal that was right."""
    costs = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 1.4))
    rounds = Rounds(costs, StubLookup(0.3))
    assert rounds.play(target=7).sources == []
    assert rounds.play(target=7).sources == ["n-gram"]
    rounds = Rounds(costs, StubLookup(0.3))
    assert [rounds.play(target=8).sources for _ in range(9)] == [[]] * 9


def test_a_discarded_token_is_compared_with_the_model_s_own_where_decoding_is_greedy():
    """A sampled token says little about whether another one would have been accepted."""
    rounds = Rounds(CHEAP, StubExit(0.05))
    assert rounds.play(target=7).sources == []
    paused = [rounds.play(target=7).sources for _ in range(BACKOFF_ROUNDS)]  # it was a loss
    assert paused == [[]] * BACKOFF_ROUNDS
    assert rounds.play(target=7).sources == ["early-exit"]
    for target, greedy in ((8, True), (7, False)):
        rounds = Rounds(CHEAP, StubExit(0.05), greedy=greedy)
        assert {len(rounds.play(target=target)) for _ in range(40)} == {0}


def test_tokens_behind_a_rejected_one_teach_nothing():
    rounds = Rounds(CHEAP, StubExit(0.95))
    rounds.play(accepted=0)
    acceptance = rounds.controller._acceptance
    assert acceptance.of("early-exit", 0.95) == pytest.approx(3 * 0.95 / 4)
    assert acceptance.exit_mean == pytest.approx(1.6 / 3)


def test_throughput_is_at_least_that_of_plain_decoding():
    throughput = Throughput()
    assert throughput.rate == 1.0
    throughput.update(1, 3.0)
    assert throughput.rate == 1.0
    for _ in range(200):
        throughput.update(3, 1.5)
    assert throughput.rate == pytest.approx(2.0, rel=1e-3)


# --- backing off --------------------------------------------------------------------------------


def test_pauses_double_and_end_where_drafting_pays():
    backoff = Backoff()
    pauses = []
    for _ in range(7):
        assert backoff.next_round()
        backoff.update(1, 9.0)
        pauses.append(0)
        while not backoff.next_round():
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 32, MAX_BACKOFF_ROUNDS]
    backoff.judge(True)
    backoff.judge(False)
    assert [backoff.next_round() for _ in range(2)] == [False, True]


def test_earlier_gains_are_not_all_lost_again():
    backoff, losses = Backoff(), 0
    for _ in range(60):
        backoff.update(9, 1.0)
    while backoff.next_round():
        backoff.update(1, 2.0)
        losses += 1
    assert 2 < losses < 60


def test_a_source_that_loses_is_paused_and_another_goes_on():
    rounds = Rounds(CHEAP, StubLookup(0.3), StubExit(0.95))
    rounds.controller._backoff["early-exit"].judge(False)
    n = BACKOFF_ROUNDS + 1
    sources = [rounds.play(accepted=0, max_tokens=1).sources for _ in range(n)]
    assert sources == [["n-gram"]] * BACKOFF_ROUNDS + [["early-exit"]]


@pytest.mark.parametrize(
    "costs",
    [
        DraftCosts(layers=0.13, head=0.02, passes=(1.0, 1.05)),  # exit 4 of 30, reduced head
        DraftCosts(layers=0.4, head=0.21, passes=(1.0, 1.3)),  # exit 15 of 30, int4
        DraftCosts(layers=0.13, head=0.02, passes=(1.0, 2.0, 1.5, 1.4)),  # float32
    ],
)
def test_drafts_that_are_always_wrong_cost_little(costs):
    """An exit and n-grams, 200 tokens; pauses grow to 32 rounds."""
    for confidence in (0.35, 0.95):
        rounds = Rounds(costs, StubLookup(0.6, 0.7, 0.8), StubExit(confidence))
        for _ in range(200):
            rounds.play(accepted=0)
        assert rounds.time <= 1.07 * 200


# --- other controllers --------------------------------------------------------------------------


def test_a_fixed_draft_is_a_look_up_or_else_of_the_exit():
    def sources(*drafters):
        draft = Draft(torch.tensor([[0]]), ScriptedDecoder([1]).new_cache(64), [0])
        FixedController(drafters).fill(draft, 4)
        return draft.sources

    exit_, ngram, datastore = StubExit(0.1), StubLookup(0.1, 0.1), StubLookup(0.9, name="datastore")
    assert sources(exit_, ngram, datastore) == ["n-gram"] * 2
    assert sources(exit_, StubLookup(), datastore) == ["datastore"]
    assert sources(exit_, StubLookup()) == ["early-exit"] * 4
    assert sources(StubLookup()) == []


# --- costs --------------------------------------------------------------------------------------

MEASURED = StepCosts(
    dtype="float32",
    weights="16bit",
    device="cpu",
    kernels="pytorch",
    exit_layer=2,
    draft_step=0.5,
    draft_tokens_scored=75,
    head=0.4,
    passes=(1.0, 1.2, 1.3),
    overhead=0.05,
)


def test_costs_are_shares_of_the_bytes_read():
    decoder = tiny_decoder("llama3.1")
    head = decoder.head.weight_bytes / decoder.weight_bytes
    costs = DraftCosts.of(decoder, 1, 0.5)
    assert costs.head == pytest.approx(head / 2)
    assert costs.layers == pytest.approx((1 - head) / LAYERS)
    assert costs.passes == (1.0, 1.06)  # of `conftest.py`
    assert DraftCosts.of(decoder, 0).layers == 0.0


def test_measured_costs_fit_other_exits_and_heads():
    """Of 0.5 a quarter of the head, 0.1, is the draft's own head: two layers take 0.4."""
    costs = DraftCosts.of(ScriptedDecoder([1], vocab_size=300), 1, 0.5, MEASURED)
    assert costs.layers == pytest.approx(0.2)
    assert costs.head == pytest.approx(0.2)
    assert (costs.passes, costs.overhead) == ((1.0, 1.2, 1.3), 0.05)


def test_passes_beyond_the_measured_ones_are_continued_by_the_machine_s(monkeypatch):
    """Three positions were measured, at 1.25 times what they are estimated to take."""
    passes = 1.0, 1.0, 1.04, 1.28, 1.6
    monkeypatch.setattr(controller, "_machine_costs", lambda _: PassCosts(passes))
    decoder = ScriptedDecoder([1], vocab_size=300)
    for contexts in ((0,), (0, 0)):
        costs = DraftCosts.of(decoder, 1, measured=MEASURED, contexts=contexts)
        assert costs.passes == pytest.approx((1.0, 1.2, 1.3, 1.6, 2.0))


def context_as_large_as_the_weights(decoder):
    a = decoder.architecture
    return decoder.weight_bytes // (2 * a.n_layers * a.n_kv_heads * a.head_dim * 4)


def test_keys_and_values_of_a_long_context_cost_as_weights_do():
    decoder = tiny_decoder("llama3.1")
    context, row = context_as_large_as_the_weights(decoder), controller._ATTENTION_ROW
    near, far = DraftCosts.of(decoder, 1, 0.5), DraftCosts.of(decoder, 1, 0.5, None, [context])
    assert far.head == pytest.approx(near.head / 2, rel=0.05)
    assert far.layers == pytest.approx(near.layers / 2 + 0.5 / LAYERS, rel=0.05)
    expected = [1.0, 0.5 * 1.06 + 0.5 * (1 + row)]
    assert [far.over(n) for n in (1, 2)] == pytest.approx(expected, rel=0.05)
    # A context that `tune` has measured does not count again.
    behind = dataclasses.replace(MEASURED, context=context)
    same = DraftCosts.of(decoder, 1, 0.5, behind, [context])
    assert same == DraftCosts.of(decoder, 1, 0.5, MEASURED)
    twice = DraftCosts.of(decoder, 1, 0.5, behind, [2 * context])
    assert twice.attention == pytest.approx(1 / 3, rel=0.05)
    window = tiny_decoder("mistral")  # of 5 positions, which bounds the cost
    costs = [DraftCosts.of(window, 1, contexts=[n]).attention for n in (4, 5, 500)]
    assert costs[0] < costs[1] == costs[2]


def test_attention_takes_the_time_that_was_measured(monkeypatch):
    """Over one position 512 others add 0.3 to a step of layers alone, and over four 0.6."""
    decoder = tiny_decoder("llama3.1")
    timed = PassCosts((1.0, 1.1, 1.2, 1.3), (0.3, 0.4, 0.5, 0.6))
    monkeypatch.setattr(controller, "pass_costs", lambda decoder: timed)
    of_layers = 1 - decoder.head.weight_bytes / decoder.weight_bytes
    for context in (0, 512, 2048):
        costs = DraftCosts.of(decoder, 1, contexts=(context,))
        more = of_layers * 0.3 * context / 512
        assert costs.over(1) == pytest.approx(1.0)
        assert costs.over(4) == pytest.approx((1.3 + more * (1 + 3 / 3)) / (1 + more))


def test_each_prompt_of_a_batch_reads_its_own_context():
    decoder = tiny_decoder("llama3.1")
    context, row = context_as_large_as_the_weights(decoder), controller._ATTENTION_ROW
    costs = DraftCosts.of(decoder, 1, 0.5, MEASURED, [context] * 3)
    assert costs.attention == pytest.approx(3 / 4, rel=0.05)
    products = DraftCosts.of(decoder, 1, 0.5, MEASURED, [0] * 3)
    for positions, attention in ((3, 1.0), (6, 1.0 + row), (9, 1.0 + 2 * row)):
        expected = products.over(positions, 3) / 4 + 3 / 4 * attention
        assert costs.over(positions, 3) == pytest.approx(expected, rel=0.05)
    # The contexts of two that have ended are not read any more.
    expected = products.over(3) / 4 + 1 / 4 * (1.0 + 2 * row)
    assert costs.over(3, 1) == pytest.approx(expected, rel=0.05)


def test_passes_beyond_the_measured_ones_continue_their_second_half():
    def over(*passes):
        costs = DraftCosts(layers=0.0, head=0.0, passes=passes)
        return [costs.over(n) for n in (1, 2, 7, 9)]

    assert over(1.0, 1.0, 1.1, 1.6, 1.5) == pytest.approx([1.0, 1.0, 1.9, 2.3])
    assert over(1.0, 1.5, 1.75) == pytest.approx([1.0, 1.5, 2.75, 3.25])
    assert over(1.0) == [1.0] * 4
    assert over(1.0, 2.0, 1.5) == [1.0, 2.0, 1.5, 1.5]  # never falling


def test_a_round_is_its_draft_and_its_verification():
    """Three drafted, four scored: four runs of the first layers, four heads, the rest over four."""
    costs = DraftCosts(layers=0.2, head=0.1, passes=(1.0, 1.05), overhead=0.03)
    assert costs.round(3, 4) == pytest.approx(4 * 0.2 + 4 * 0.1 + 0.8 * 1.15 + 0.03)
    assert costs.round(0, 0) == 1.0
    assert costs.round(3, 0, 3) == pytest.approx(1.15)  # look-ups alone
    # Two of three from look-ups: the first layers run twice, over two positions more.
    assert costs.round(3, 1, 2) == pytest.approx(0.2 * (2 + 0.1) + 0.1 + 0.8 * 1.15 + 0.03)
    assert costs.of_tokens(4) == pytest.approx([0.2 + 0.1 + 0.8 * 0.05] * 4)
    assert costs.of_tokens(2) == costs.of_tokens(4)[:2]
    assert costs.rows(1, 2) == pytest.approx(0.1)


def test_costs_are_computed_anew_where_a_context_is_a_quarter_longer():
    costs = ContextCosts(ScriptedDecoder([1]), 1, 1.0, MEASURED)
    first = costs.at(9, 1000)
    assert costs.at(9, 1249) is first
    grown = costs.at(30, 1250)
    assert grown == DraftCosts.of(ScriptedDecoder([1]), 1, 1.0, MEASURED, [30, 1250])
    assert costs.at(30, 1251) is grown
    short = costs.at(8)  # another number of rows
    assert costs.at(9) is short
    assert costs.at(10) == DraftCosts.of(ScriptedDecoder([1]), 1, 1.0, MEASURED, [10])


def test_passes_are_timed_before_an_answer_begins(monkeypatch):
    timed = []
    monkeypatch.setattr(controller, "pass_costs", lambda decoder: timed.append(decoder))
    model = scripted_model([1])
    model.answer([5], mode="plain")
    assert not timed
    model.answer([5])
    assert timed == [model.decoder]
