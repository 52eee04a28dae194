"""Sampled continuations come from the model's distribution, in plain and self-speculative decoding.

A chi-square test over 2,000 continuations each, and 3,000 rows of batches, made by the step loop itself
with fixed seeds, of all their tokens jointly, against the probabilities of every continuation.
"""

import dataclasses
import itertools

import pytest
import torch
from layerskip.decoding.drawn_from import DrawnFrom
from scipy import stats
from tiny_decoders import PLAIN, ids, speculative, steps, tiny_decoder

import tiny_models
from layerskip.decoding import Sampling, accept
from layerskip.decoding.accept import accept_sampled
from layerskip.decoding.batch import Batch
from layerskip.model import Distributions, StepCosts, load

VOCABULARY = 5
PROMPT = [2, 0, 1, 2, 0]  # what followed 2, 0 is there for n-grams
N_TOKENS = 4  # the prompt's own token and one round of two drafted tokens and one more
SAMPLES = 2_000
SAMPLING = Sampling(temperature=0.5, top_p=0.95)
SPECULATIVE = speculative(1, 2)
# A token that is less sure than about 0.3 is not worth its cost: most that are likely are, others not.
COSTS = StepCosts(
    dtype="float32",
    weights="16bit",
    device="cpu",
    kernels="compiled",
    exit_layer=1,
    draft_step=0.25,
    draft_tokens_scored=5,
    head=0.05,
    passes=(1.0, 1.06),
    overhead=0.0,
)
ADAPTIVE = dataclasses.replace(SPECULATIVE, adaptive=True, costs=COSTS)
TEXT = (2, 0, 2, 2, 0, 2, 1, 1, 2, 0, 2, 1)  # which says otherwise than the prompt
PLANS = {
    "plain": PLAIN,
    "fixed": SPECULATIVE,
    "adaptive": ADAPTIVE,
    "short head": dataclasses.replace(SPECULATIVE, draft_vocabulary=(0, 2)),
    "n-grams": dataclasses.replace(SPECULATIVE, exit_layer=None, draft_from="n-gram"),
    "both": dataclasses.replace(SPECULATIVE, draft_from="both", draft_vocabulary=(0, 2)),
    "draft text": dataclasses.replace(
        SPECULATIVE,
        exit_layer=None,
        draft_from="n-gram",
        adaptive=True,
        costs=COSTS,
        draft_text=TEXT,
    ),
    "all together": dataclasses.replace(
        ADAPTIVE, draft_from="both", draft_vocabulary=(0, 2), draft_text=TEXT
    ),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
# A sound sampler falls below it once in a thousand seeds; the seeds are fixed.
LEAST_P_VALUE = 1e-3


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder(
        "qwen2",
        upper=2.0,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="module")
def expected(decoder):
    return probabilities(decoder, SAMPLING)


@pytest.fixture(scope="module")
def compiled(compiled_kernels, tmp_path_factory):
    """One that works out no more of a distribution than is asked for."""
    folder = tmp_path_factory.mktemp("compiled")
    tiny_models.build("llama3.2", vocab_size=VOCABULARY).save_pretrained(folder)
    return load(folder, dtype=torch.float32, compiled=True).decoder


def probabilities(decoder, sampling):
    """Probability of every continuation, [V] * N_TOKENS, by a full pass over each of them."""
    endings = list(itertools.product(range(VOCABULARY), repeat=N_TOKENS))
    sequences = torch.tensor([[*PROMPT, *ending] for ending in endings])
    cache = decoder.new_cache(sequences.shape[1], len(endings))
    logits = decoder.logits(decoder.run(decoder.embed(sequences), 0, len(decoder.layers), cache))
    total = torch.ones(len(endings), dtype=torch.float64)
    for at in range(len(PROMPT), sequences.shape[1]):
        seen = torch.zeros(len(endings), VOCABULARY, dtype=torch.bool)
        seen.scatter_(1, sequences[:, :at], True)
        p = sampling.probabilities(sampling.penalize(logits[:, at - 1], seen))
        total *= p.gather(1, sequences[:, at, None])[:, 0]
    assert total.sum().item() == pytest.approx(1.0, abs=1e-5)
    return total.view([VOCABULARY] * N_TOKENS)


def count_continuations(decoder, plan, n, sampling=SAMPLING):
    """How often each continuation came up, [V] * N_TOKENS."""
    counts = torch.zeros([VOCABULARY] * N_TOKENS, dtype=torch.int64)
    for seed in range(n):
        counts[tuple(ids(decoder, PROMPT, plan, N_TOKENS, sampling, seed=seed))] += 1
    return counts


def p_value(counts, expected):
    """Chi-square over the continuations; those expected fewer than 5 times are one cell together."""
    counts, expected = counts.flatten().double(), expected.flatten() * counts.sum()
    if counts[expected == 0].sum() > 0:  # top-p rules these out
        return 0.0
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum(0, keepdim=True)])
    due = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
    due *= seen.sum() / due.sum()  # float32 sums to one within 1e-5, the test wants 1e-8
    return float(stats.chisquare(seen.numpy(), due.numpy()).pvalue)


@plans
def test_continuations_are_distributed_as_the_model_says(decoder, expected, plan):
    counts = count_continuations(decoder, plan, SAMPLES)
    assert p_value(counts, expected) > LEAST_P_VALUE


@plans
def test_the_penalty_of_what_stands_there_is_in_the_distribution(decoder, plan):
    sampling = dataclasses.replace(SAMPLING, repetition_penalty=2.0)
    counts = count_continuations(decoder, plan, SAMPLES, sampling)
    assert p_value(counts, probabilities(decoder, sampling)) > LEAST_P_VALUE


@pytest.mark.parametrize("name", ["fixed", "short head", "all together"])
def test_all_truncations_at_once_are_in_the_distribution(decoder, name):
    sampling = Sampling(temperature=0.8, top_k=4, min_p=0.05, repetition_penalty=1.5)
    counts = count_continuations(decoder, PLANS[name], SAMPLES, sampling)
    assert p_value(counts, probabilities(decoder, sampling)) > LEAST_P_VALUE


@plans
def test_the_kernels_draw_what_the_model_says(compiled, plan):
    sampling = Sampling(temperature=0.7)
    p = compiled.distributions(torch.ones(1, 1, compiled.architecture.hidden_size))
    assert p.looked_up
    counts = count_continuations(compiled, plan, SAMPLES, sampling)
    assert p_value(counts, probabilities(compiled, sampling)) > LEAST_P_VALUE


@pytest.mark.parametrize("tries", [0, 1, 16])
def test_what_p_has_above_q_is_drawn_in_so_many_tries(tries, monkeypatch):
    monkeypatch.setattr(accept, "_TRIES", tries)
    p = torch.tensor([[[0.1, 0.4, 0.3, 0.2, 0.0]]])
    q = torch.tensor([[[0.5, 0.1, 0.3, 0.0, 0.1]]])
    drawn = DrawnFrom(torch.tensor([[0]]), 5, (Distributions(q),), (torch.tensor([[0]]),))
    generator = torch.Generator().manual_seed(0)
    own = [accept._beyond(drawn, Distributions(p), 0, 0, generator) for _ in range(SAMPLES)]
    assert set(own) == {1, 3}
    assert stats.binomtest(own.count(1), SAMPLES, 0.6).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("name", ["plain", "fixed", "short head", "adaptive"])
def test_rows_of_a_batch_are_distributed_as_the_model_says(decoder, expected, name):
    counts, rows = torch.zeros([VOCABULARY] * N_TOKENS, dtype=torch.int64), SAMPLES // 2
    how = {"plan": PLANS[name], "sampling": SAMPLING, "max_new_tokens": N_TOKENS}
    for seed in range(3):
        found = [[] for _ in range(rows)]
        for row, step in Batch(decoder, [PROMPT] * rows, seed=seed, **how).steps():
            found[row] += step.tokens
        for tokens in found:
            counts[tuple(tokens)] += 1
    assert p_value(counts, expected) > LEAST_P_VALUE


@pytest.mark.parametrize("name", ["n-grams", "short head", "both"])
def test_every_source_drafts_here(decoder, name):
    rounds = [
        step
        for seed in range(50)
        for step in steps(decoder, PROMPT, PLANS[name], N_TOKENS, SAMPLING, seed=seed)[1:]
    ]
    accepted = {(step.source, step.accepted > 0) for step in rounds if step.drafted}
    sources = {"n-grams": ["n-gram"], "short head": ["early-exit"]}
    for source in sources.get(name, ["n-gram", "early-exit"]):
        assert accepted >= {(source, True), (source, False)}


def test_drafts_are_accepted_and_rejected_at_every_position(decoder):
    rounds = [
        step
        for seed in range(200)
        for step in steps(decoder, PROMPT, SPECULATIVE, N_TOKENS, SAMPLING, seed=seed)[1:]
    ]
    assert {(step.drafted, step.accepted) for step in rounds} >= {(2, 0), (2, 1), (2, 2)}


def test_an_adaptive_draft_may_not_look_at_what_was_drawn(decoder, expected, monkeypatch):
    """Kept for its own probability, a token would be likelier than the model says."""
    draw, drawn = Distributions.draw, []

    def recorded(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(Distributions, "draw", recorded)
    monkeypatch.setattr(Distributions, "highest", lambda q, i: q.of(i, drawn[-1]))
    counts = count_continuations(decoder, ADAPTIVE, 2 * SAMPLES)
    assert p_value(counts, expected) < LEAST_P_VALUE / 1000


def from_p_after_a_rejection(drafted, q, p, generator):
    """Wrong: draws from p, not from what p has above q."""
    accepted, _ = accept_sampled(drafted, q, p, generator)
    return accepted, torch.multinomial(p[0, accepted], 1, generator=generator)[:, 0]


def always(drafted, q, p, generator):
    """Wrong: the draft stands whatever the model says."""
    accepted = torch.tensor([drafted.shape[1]])
    return accepted, torch.multinomial(p[0, -1:], 1, generator=generator)[:, 0]


def with_another_temperature(drafted, q, p, generator):
    """Wrong: compares with a q that the draft was not drawn from."""
    if q is not None:
        q = (q.whole.log() * 0.5).softmax(-1)
    return accept_sampled(drafted, q, p, generator)


@pytest.mark.parametrize("wrong", [from_p_after_a_rejection, always, with_another_temperature])
def test_a_wrong_acceptance_rule_is_found_out(decoder, expected, wrong, monkeypatch):
    """The power of the test."""
    monkeypatch.setattr(accept, "accept_sampled", wrong)
    counts = count_continuations(decoder, SPECULATIVE, SAMPLES)
    assert p_value(counts, expected) < LEAST_P_VALUE / 1000
