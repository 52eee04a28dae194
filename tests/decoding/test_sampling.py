"""The one definition of the next token's distribution."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import tiny_decoder
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from layerskip.decoding import Sampling
from layerskip.decoding.sampling import Sampler, TokenHistory, nth_seed, sample

VOCABULARY = 50
TOP_KS, TOP_PS, MIN_PS = (None, 1, 7, 200), (None, 0.2, 0.9, 1.0), (None, 0.05, 0.5, 1.0)
CPU = torch.device("cpu")


def random_logits(rows, seed=0, scale=3.0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def their_probabilities(logits, temperature, top_k, top_p, min_p):
    processors = LogitsProcessorList([theirs.TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(theirs.TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(theirs.TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(theirs.MinPLogitsWarper(min_p))
    return processors(None, logits).softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_probabilities_equal_transformers(temperature):
    logits = random_logits(32)
    for top_k, top_p, min_p in itertools.product(TOP_KS, TOP_PS, MIN_PS):
        rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        probabilities = rule.probabilities(logits[:, None])[:, 0]
        expected = their_probabilities(logits, temperature, top_k, top_p, min_p)
        assert torch.equal(probabilities > 0, expected > 0), (top_k, top_p, min_p)
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits, tokens = random_logits(1), torch.tensor([[3, 9, 3, 40]])
    penalized = Sampling(repetition_penalty=penalty).penalize(
        logits[:, None], *TokenHistory(tokens, VOCABULARY).before(tokens[:, :0])
    )
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(penalized[:, 0], expected)


@given(
    committed=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    draft=st.lists(st.integers(0, 9), max_size=6),
)
def test_history_before_each_position(committed, draft):
    """Row i has seen the committed tokens and the i drafted ones before it, nothing later."""
    history = TokenHistory(torch.tensor([committed[:1]]), 10)
    if committed[1:]:
        history.extend(committed[1:])
    seen, counts = history.before(torch.tensor([draft], dtype=torch.int64))
    assert seen.shape == (1, len(draft) + 1, 10)
    for i, row in enumerate(seen[0]):
        assert set(row.nonzero()[:, 0].tolist()) == {*committed, *draft[:i]}
        answer = [*committed[1:], *draft[:i]]
        assert counts[0, i].tolist() == [answer.count(token) for token in range(10)]
    without_draft, _ = history.before(torch.zeros(1, 0, dtype=torch.int64))
    assert torch.equal(without_draft[0, 0], seen[0, 0])  # looking ahead commits nothing


@given(
    temperature=st.floats(0.0, 1e6, exclude_min=True),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.none() | st.floats(0.0, 1.0),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_probabilities_are_a_distribution(temperature, top_k, top_p, min_p, scale, dtype):
    """For any options: float32, no NaN, sums to one, and the most likely token stays that."""
    logits = random_logits(4, scale=scale).to(dtype)
    rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = rule.probabilities(logits)
    assert p.dtype == torch.float32
    assert p.isfinite().all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4), rtol=0, atol=1e-5)
    logits = logits.double()
    below_best = logits.amax(-1) - logits.gather(1, p.argmax(-1, keepdim=True))[:, 0]
    assert (below_best <= 1e-6 * temperature).all()  # float32 sees no smaller difference


def test_truncation_by_row_equals_the_dense_form():
    """On a CPU each row is truncated alone; logits in steps, so that many are equal."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(4, 3000, generator=generator) * (1 + seed % 4)).mul(4).round().div(4)
        p, m, t = torch.rand(3, generator=generator).tolist()
        for top_k, top_p, min_p in itertools.product((None, 1, 40), (None, p), (None, m * m)):
            rule = Sampling(temperature=0.2 + t, top_k=top_k, top_p=top_p, min_p=min_p)
            by_row, dense = rule.probabilities(logits), rule._dense(logits)
            assert torch.equal(by_row > 0, dense > 0), (top_k, top_p, min_p)
            torch.testing.assert_close(by_row, dense, rtol=0, atol=1e-6)


def test_half_precision_logits_are_widened_before_the_softmax():
    """In float16 a flat distribution over a large vocabulary would be all wrong."""
    logits = torch.zeros(1, 1, 49_152, dtype=torch.bfloat16)
    p = Sampling(temperature=1.0, top_p=0.5).probabilities(logits)
    assert (p > 0).sum() == 49_152 // 2
    torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=0, atol=1e-5)


def test_samples_are_as_likely_as_their_weights():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    tokens = sample(weights.repeat(4_000, 1), torch.Generator().manual_seed(0)).view(-1, 2)
    assert set(tokens[:, 0].tolist()) == {1, 3}
    assert set(tokens[:, 1].tolist()) == {2}
    share = (tokens[:, 0] == 1).float().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 4_000) ** 0.5


def test_only_tokens_with_a_weight_are_sampled(monkeypatch):
    def rand(uniform, *shape, **_):
        return torch.full(shape, uniform).double()

    for uniform, expected in ((0.0, [1, 2]), (1.0, [3, 2]), (0.75, [3, 2])):
        weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
        monkeypatch.setattr(torch, "rand", partial(rand, uniform))
        assert sample(weights, None).tolist() == expected


def test_weights_that_are_no_distribution_are_refused():
    for bad in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="results are not finite"):
            sample(torch.stack([torch.ones(7), torch.full((7,), bad)]), None)


def test_a_sampler_is_greedy_or_samples():
    """The token after hidden states: the argmax of (penalized) logits, or a sample."""
    for penalty in (1.0, 1.5):
        decoder = tiny_decoder("llama2")
        prompt, hidden = torch.tensor([[3, 9]]), torch.randn(1, 1, 64)
        rule = Sampling(repetition_penalty=penalty)
        history = TokenHistory(prompt, 96).before(prompt[:, :0])
        best = rule.penalize(decoder.logits(hidden), *history).argmax(-1)
        for temperature in (0.0, 1e-9):
            options = Sampling(temperature=temperature, repetition_penalty=penalty)
            sampler = Sampler(options, CPU, 0, prompt, 96)
            assert torch.equal(sampler.next_tokens(decoder, hidden), best)
        hot = Sampling(temperature=2.0, repetition_penalty=penalty)
        samples = [
            int(Sampler(hot, CPU, seed, prompt, 96).next_tokens(decoder, hidden))
            for seed in (1, 1, 2, 3, 4)
        ]
        assert samples[0] == samples[1]
        assert len(set(samples)) > 1


def test_a_batch_has_no_repetition_penalty():
    with pytest.raises(ValueError, match="penalties are for one prompt"):
        Sampler(Sampling(repetition_penalty=1.2), CPU)


def test_the_seed_after_the_last_is_the_first():
    assert [nth_seed(2**64 - 1, i) for i in range(3)] == [2**64 - 1, 0, 1]
    assert nth_seed(7) == 7
    assert nth_seed(None, 3) is None
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="it has to fit into 64 bits"):
            nth_seed(seed, 1)
