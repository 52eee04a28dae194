"""What a round costs, by numbers that can be followed by hand."""

import dataclasses

import pytest
import torch
from layerskip.decoding.draft_costs import ContextCosts, DraftCosts
from scripted import ScriptedDecoder, scripted_model
from tiny_decoders import LAYERS, tiny_decoder

from layerskip.decoding import draft_costs
from layerskip.model import StepCosts
from layerskip.model.step_timing import PassCosts

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
    assert costs.passes == (1.0, 1.06)  # float32 on a CPU
    assert DraftCosts.of(decoder, 0).layers == 0.0


def test_in_pytorch_positions_cost_what_they_were_timed_to(monkeypatch):
    """Whatever more rows cost the compiled kernels; nothing is added to whole passes."""
    timed = {torch.float32: (1.0, 1.75, 1.5), torch.bfloat16: (1.0, 1.125, 1.25)}
    monkeypatch.setattr(draft_costs, "pass_costs", lambda decoder: PassCosts(timed[decoder.dtype]))
    decoder = ScriptedDecoder([1])
    decoder.weights = "int8"
    for decoder.dtype in timed:
        costs = DraftCosts.of(decoder, 1)
        assert costs.passes == timed[decoder.dtype]
        # More is verified at a time where that is cheap, and nothing is gained by waiting.
        assert all(costs.over(n) <= n for n in range(1, 20))


def test_they_are_timed_before_an_answer_begins(monkeypatch):
    asked = []
    monkeypatch.setattr(draft_costs, "pass_costs", lambda decoder: asked.append(decoder))
    model = scripted_model([1])
    model.answer([5], mode="plain")
    assert not asked
    model.answer([5])
    assert asked == [model.decoder]


def test_a_context_has_grown_when_it_is_a_quarter_longer():
    costs = ContextCosts(ScriptedDecoder([1]), 1, None, MEASURED)
    counted = costs.over([9, 1000])
    assert costs.grown([1249]) is None
    grown = costs.grown([30, 1250])
    assert grown == DraftCosts.of(ScriptedDecoder([1]), 1, 1.0, MEASURED, [30, 1250])
    assert grown != counted
    assert costs.grown([1251]) is None  # it has just been counted
    costs.over([4])
    assert costs.grown([67]) is None  # what attention takes there does not count
    assert costs.grown([68]) is not None


def test_measured_costs_come_first_and_fit_other_exits_and_heads():
    # Of 0.5 a quarter of the head, 0.1, is the draft's own head: two layers take 0.4.
    costs = DraftCosts.of(ScriptedDecoder([1], vocab_size=300), 1, 0.5, MEASURED)
    assert costs.layers == pytest.approx(0.2)
    assert costs.head == pytest.approx(0.2)
    assert (costs.passes, costs.overhead) == ((1.0, 1.2, 1.3), 0.05)


def test_passes_over_several_prompts_go_on_as_estimated(monkeypatch):
    """Three positions were measured, at twice what they are estimated to take."""
    passes = 1.0, 0.6, 0.65, 0.8, 1.1
    monkeypatch.setattr(draft_costs, "_of_machine", lambda _: PassCosts(passes))
    decoder = ScriptedDecoder([1], vocab_size=300)
    assert DraftCosts.of(decoder, 1, measured=MEASURED).passes == (1.0, 1.2, 1.3)
    costs = DraftCosts.of(decoder, 1, measured=MEASURED, contexts=(0, 0))
    assert costs.passes == pytest.approx((1.0, 1.2, 1.3, 1.6, 2.2))


def test_keys_and_values_of_a_long_context_cost_as_weights_do():
    decoder = tiny_decoder("llama3.1")
    a = decoder.architecture
    context = decoder.weight_bytes // (2 * a.n_layers * a.n_kv_heads * a.head_dim * 4)
    near, far = DraftCosts.of(decoder, 1, 0.5), DraftCosts.of(decoder, 1, 0.5, None, [context])
    half = pytest.approx  # of a step is attention, within a position's rounding
    assert far.head == half(near.head / 2, rel=0.05)
    assert far.layers == half(near.layers / 2 + 0.5 / LAYERS, rel=0.05)
    row = draft_costs._ATTENTION_ROW
    assert [far.over(n) for n in (1, 2)] == half([1.0, 0.5 * 1.06 + 0.5 * (1 + row)], rel=0.05)


def test_attention_takes_what_it_was_timed_to_behind_any_context(monkeypatch):
    """Of a step of layers alone 512 positions took 0.3 more, and of one over four 0.6."""
    decoder = tiny_decoder("llama3.1")
    timed = PassCosts((1.0, 1.1, 1.2, 1.3), (0.3, 0.4, 0.5, 0.6), seconds=1e-2)
    monkeypatch.setattr(draft_costs, "pass_costs", lambda decoder: timed)
    of_layers = 1 - decoder.head.weight_bytes / decoder.weight_bytes
    for context in (0, 512, 2048):
        costs, more = (
            DraftCosts.of(decoder, 1, contexts=(context,)),
            of_layers * 0.3 * context / 512,
        )
        assert costs.over(1) == pytest.approx(1.0)
        # Three more positions, and what little is done for a verification.
        expected = 1.3 + draft_costs._VERIFYING_S / 1e-2 + more * (1 + 3 / 3)
        assert costs.over(4) == pytest.approx(expected / (1 + more))
        assert costs.overhead == pytest.approx(draft_costs._DRAFTING_S / 1e-2 / (1 + more))


def test_a_window_bounds_what_a_long_context_costs():
    decoder = tiny_decoder("mistral")
    window, near, far = (
        DraftCosts.of(decoder, 1, 0.5, None, [context]).attention for context in (5, 4, 500)
    )
    assert near < window == far


def test_a_context_that_was_measured_does_not_count_again():
    decoder = tiny_decoder("llama3.1")
    a = decoder.architecture
    context = decoder.weight_bytes // (2 * a.n_layers * a.n_kv_heads * a.head_dim * 4)
    behind = dataclasses.replace(MEASURED, context=context)
    same = DraftCosts.of(decoder, 1, 0.5, behind, [context])
    assert same == DraftCosts.of(decoder, 1, 0.5, MEASURED)
    assert same == DraftCosts.of(decoder, 1, 0.5, behind, [context // 2])
    # As many bytes again, beside weights and what was measured.
    assert DraftCosts.of(decoder, 1, 0.5, behind, [2 * context]).attention == pytest.approx(
        1 / 3, rel=0.05
    )


def test_each_prompt_of_a_batch_reads_its_own_context():
    decoder = tiny_decoder("llama3.1")
    a = decoder.architecture
    context = decoder.weight_bytes // (2 * a.n_layers * a.n_kv_heads * a.head_dim * 4)
    costs = DraftCosts.of(decoder, 1, 0.5, MEASURED, [context] * 3)
    assert costs.attention == pytest.approx(3 / 4, rel=0.05)
    products = DraftCosts.of(decoder, 1, 0.5, MEASURED, [0] * 3)
    row = draft_costs._ATTENTION_ROW
    for positions, attention in ((3, 1.0), (6, 1.0 + row), (9, 1.0 + 2 * row)):
        expected = products.over(positions, 3) / 4 + 3 / 4 * attention
        assert costs.over(positions, 3) == pytest.approx(expected, rel=0.05)
    # Of two that have ended nothing is read any more.
    expected = products.over(3) / 4 + 1 / 4 * (1.0 + 2 * row)
    assert costs.over(3, 1) == pytest.approx(expected, rel=0.05)


def test_passes_go_on_as_they_ended():
    noisy = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 1.0, 1.1, 1.6, 1.5))
    assert noisy.over(7) == pytest.approx(1.9)  # 0.2 a position in the second half
    costs = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 1.5, 1.75))
    assert [costs.over(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.5, 1.75, 2.0, 2.5]
    assert DraftCosts(layers=0.0, head=0.0, passes=(1.0,)).over(9) == 1.0
    falling = DraftCosts(layers=0.0, head=0.0, passes=(1.0, 2.0, 1.5))
    assert falling.over(9) == 1.5


def test_a_round_is_its_draft_and_its_verification():
    """Three drafted, four scored: four runs of the first layers, four heads, the rest over four."""
    costs = DraftCosts(layers=0.2, head=0.1, passes=(1.0, 1.05), overhead=0.03)
    assert costs.round(3, 4) == pytest.approx(4 * 0.2 + 4 * 0.1 + 0.8 * 1.15 + 0.03)
    assert costs.round(0, 0) == pytest.approx(1.03)
    assert costs.token(3) == pytest.approx(0.2 + 0.1 + 0.8 * 0.05)


def test_the_draft_length_of_a_batch():
    free = DraftCosts(layers=0.1, head=0.0, passes=(1.0,))
    # One draft: 1.8 tokens in 1.1 steps; two: 2.44 in 1.2; each further one while it brings more.
    assert free.batch_draft_tokens(4, 1, 0.8) == 1
    assert free.batch_draft_tokens(4, 2, 0.8) == 2
    assert free.batch_draft_tokens(4, 20, 0.8) == 6
    assert free.batch_draft_tokens(4, 10**10, 0.8) == 6  # nor are those looked at that cannot win
    assert free.batch_draft_tokens(4, 20, 0.1) == 0
    assert DraftCosts(layers=0.1, head=0.0, passes=(1.0, 2.0)).batch_draft_tokens(4, 5, 0.8) == 0
