"""The one definition of the next token's distribution."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from layerskip.decoding import Sampling
from layerskip.decoding.sampling import TokenHistory, draw, next_token
from layerskip.model import Distributions, most_likely

VOCABULARY = 50
TEMPERATURES, TOP_KS = (0.3, 1.0, 1.7), (None, 1, 7, 50, 200)
TOP_PS, MIN_PS = (None, 0.2, 0.9, 1.0), (None, 0.05, 0.5, 1.0)


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


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_equal_transformers(temperature):
    logits = random_logits(64)
    for top_k, top_p, min_p in itertools.product(TOP_KS, TOP_PS, MIN_PS):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ours = sampling.probabilities(logits[:, None])[:, 0]
        expected = their_probabilities(logits, temperature, top_k, top_p, min_p)
        assert torch.equal(ours > 0, expected > 0), (top_k, top_p, min_p)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits, tokens = random_logits(1), torch.tensor([[3, 9, 3, 40]])
    ours = Sampling(repetition_penalty=penalty).penalize(
        logits[:, None], TokenHistory(tokens, VOCABULARY).before(tokens[:, :0])
    )
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(ours[:, 0], expected)


@given(
    settled=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    unsettled=st.lists(st.integers(0, 9), max_size=6),
)
def test_history_before_each_position(settled, unsettled):
    """Row i has seen what is settled and the i unsettled tokens before it, nothing later."""
    history = TokenHistory(torch.tensor([settled[:1]]), 10)
    if settled[1:]:
        history.extend(torch.tensor([settled[1:]]))
    seen = history.before(torch.tensor([unsettled], dtype=torch.int64))
    assert seen.shape == (1, len(unsettled) + 1, 10)
    for i, row in enumerate(seen[0]):
        assert set(row.nonzero()[:, 0].tolist()) == {*settled, *unsettled[:i]}
    looked_ahead = history.before(torch.zeros(1, 0, dtype=torch.int64))
    assert torch.equal(looked_ahead[0, 0], seen[0, 0])  # which settles nothing


@given(
    temperature=st.floats(0.0, 1e6, exclude_min=True),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.none() | st.floats(0.0, 1.0),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_probabilities_are_a_distribution(temperature, top_k, top_p, min_p, scale, dtype):
    """Whatever the settings: float32, no nan, sums to one, and the most likely stays the most likely."""
    logits = random_logits(4, scale=scale).to(dtype)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = sampling.probabilities(logits)
    assert p.dtype == torch.float32
    assert p.isfinite().all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4), rtol=0, atol=1e-5)
    logits = logits.double()
    below_best = logits.amax(-1) - logits.gather(1, p.argmax(-1, keepdim=True))[:, 0]
    assert (below_best <= 1e-6 * temperature).all()  # float32 sees no difference smaller than that


def test_lowest_temperature_is_greedy():
    logits = random_logits(8)
    best = torch.nn.functional.one_hot(logits.argmax(-1), VOCABULARY).float()
    assert torch.equal(Sampling(temperature=5e-324).probabilities(logits), best)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_a_large_vocabulary_has_the_same_sets(scale):
    """Those that have few tokens, and those that have more than are looked at first."""
    logits = torch.randn(3, 2, 5_000, generator=torch.Generator().manual_seed(1)) * scale
    for top_p in (0.1, 0.5, 0.9, 0.99):
        ours = Sampling(temperature=1.0, top_p=top_p).probabilities(logits)
        expected = their_probabilities(logits.flatten(0, 1), 1.0, None, top_p, None)
        expected = expected.view_as(ours)
        assert (ours > 0).sum(-1).tolist() == (expected > 0).sum(-1).tolist()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_off_is_the_same_for_few_tokens_and_for_all(seed):
    """On a CPU tokens are left out one by one; logits in steps, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, 300, generator=generator) * (1 + seed % 4)).mul(4).round().div(4)
    p, m, t = torch.rand(3, generator=generator).tolist()
    for top_k, top_p, min_p in itertools.product((None, 1, 40), (None, p), (None, m * m)):
        sampling = Sampling(temperature=0.2 + t, top_k=top_k, top_p=top_p, min_p=min_p)
        found, expected = sampling.probabilities(logits), sampling._dense(logits)
        assert torch.equal(found > 0, expected > 0), (top_k, top_p, min_p)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_draws_are_as_likely_as_their_weights():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(weights, generator) for _ in range(4_000)], dim=1)
    assert set(drawn[0].tolist()) == {1, 3}
    assert set(drawn[1].tolist()) == {2}
    share = (drawn[0] == 1).float().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 4_000) ** 0.5


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1, 2]), (1.0, [3, 2]), (0.75, [3, 2])])
def test_the_ends_of_a_draw_have_weights(share, expected, monkeypatch):
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, share).double())
    assert draw(weights, None)[:, 0].tolist() == expected


def test_half_precision_logits_are_widened_before_the_softmax():
    """In float16 a flat distribution over a large vocabulary would be all wrong."""
    logits = torch.zeros(1, 1, 49_152, dtype=torch.bfloat16)
    p = Sampling(temperature=1.0, top_p=0.5).probabilities(logits)
    assert (p > 0).sum() == 49_152 // 2
    torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=0, atol=1e-5)


def test_next_token():
    logits = random_logits(3)[:, None]
    decoder = SimpleNamespace(
        logits=lambda hidden: hidden,
        choose=most_likely,
        distributions=lambda hidden, t: Distributions((hidden / t).softmax(dim=-1)),
    )
    likeliest = logits.argmax(-1)
    assert torch.equal(next_token(decoder, logits, Sampling(), None), likeliest)
    for how in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1e-9)):
        assert torch.equal(next_token(decoder, logits, how, torch.Generator()), likeliest)
    draws = [
        next_token(decoder, logits, Sampling(temperature=2.0), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert len({str(draw.tolist()) for draw in draws}) > 1


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 2048, 3000])
def test_a_draw_is_where_the_running_sum_passes_its_share(size, monkeypatch):
    """Whatever the blocks are that sums are made of; some of them weigh nothing."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(4, size, generator=generator) ** 8
    weights[1, 1:1024:2] = weights[2, 1024:2048] = weights[3, 1:] = 0.0
    sums = weights.double().cumsum(dim=-1)
    for share in (0.0, *torch.rand(50, generator=generator).tolist(), 1 - 2**-53):
        monkeypatch.setattr(
            torch, "rand", lambda *shape, share=share, **_: torch.full(shape, share)
        )
        for row, own, at in zip(weights, sums, draw(weights, None)[:, 0].tolist(), strict=True):
            assert row[at] > 0
            before = own[at - 1] if at else 0.0
            assert before - 1e-5 * own[-1] <= share * own[-1] <= own[at] + 1e-5 * own[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_k", value) for value in (0, -1)),
        *(("top_p", value) for value in (0.0, -0.5, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1, float("nan"))),
        *(("repetition_penalty", value) for value in (0.0, -1.0, float("inf"), float("nan"))),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        Sampling(**{option: value})


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_what_is_no_distribution_gives_no_token(bad):
    with pytest.raises(ValueError, match="results are not finite"):
        draw(torch.stack([torch.ones(7), torch.full((7,), bad)]), None)
