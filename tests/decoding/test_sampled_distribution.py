"""Sampled continuations come from the model's distribution, however they are drafted.

Chi-square tests over continuations of four tokens with fixed seeds, of all their tokens jointly, against
the probability of every continuation, which is computed by full passes.
"""

import dataclasses
import importlib
import itertools

import pytest
import torch
from mixed_drafts import mix_drafts
from scipy import stats
from tiny_decoders import PLAIN, batch_ids, ids, speculative, steps, tiny_decoder

from layerskip.decoding import Sampling, reference
from layerskip.decoding.accept import accept_sampled
from layerskip.decoding.drafters import Candidate, EarlyExit
from layerskip.model import StepCosts

loop = importlib.import_module("layerskip.decoding.generate")  # a function has that name too

VOCABULARY = 5
PROMPT = [2, 0, 1, 2, 0]  # the n-gram 2, 0 was followed by 1
N_TOKENS = 4  # the prompt's own token and one round of two drafted tokens and one more
SAMPLES = 600
SAMPLING = {"temperature": 0.5, "top_p": 0.95}
# A token with a confidence below about 0.5 is not worth its cost, so both kinds are common.
COSTS = StepCosts(
    dtype="float32",
    weights="16bit",
    device="cpu",
    kernels="compiled",
    exit_layer=1,
    draft_step=0.55,
    draft_tokens_scored=5,
    head=0.05,
    passes=(1.0, 1.06),
    overhead=0.0,
)
DATASTORE = (2, 0, 2, 2, 0, 2, 1, 1, 2, 0, 2, 1)  # which contradicts the prompt
FIXED = speculative(1, 2)
ADAPTIVE = speculative(1, 2, adaptive=True)
ALL_SOURCES = speculative(
    1, 3, adaptive=True, draft_from="both", draft_vocabulary=(0, 2), datastore=DATASTORE
)
PREDICTION = speculative(  # which contradicts the prompt, and is found again behind a deviation
    None, 2, adaptive=True, draft_from="prediction+n-gram", prediction=(2, 1, 1, 2, 0, 2, 1)
)
MIN_P_VALUE = 1e-3  # a correct sampler falls below it once in a thousand seeds; they are fixed


def five_tokens(**changes):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return tiny_decoder("qwen2", upper=2.0, vocab_size=VOCABULARY, **small, **heads, **changes)


@pytest.fixture(scope="module")
def decoder():
    return five_tokens()


@pytest.fixture(scope="module")
def compiled(compiled_kernels):
    return tiny_decoder("llama3.2", upper=2.0, vocab_size=VOCABULARY, compiled=True)


@pytest.fixture(scope="module")
def expected(decoder):
    return probabilities(decoder, SAMPLING)


def probabilities(decoder, sampling):
    """Return the probability of every continuation, [V] * N_TOKENS, by full passes."""
    rule = Sampling(**sampling)
    endings = list(itertools.product(range(VOCABULARY), repeat=N_TOKENS))
    sequences = torch.tensor([[*PROMPT, *ending] for ending in endings])
    cache = decoder.new_cache(sequences.shape[1], len(endings))
    logits = decoder.logits(decoder.run(decoder.embed(sequences), 0, len(decoder.layers), cache))
    total = torch.ones(len(endings), dtype=torch.float64)
    for at in range(len(PROMPT), sequences.shape[1]):
        seen = torch.zeros(len(endings), VOCABULARY, dtype=torch.bool)
        seen.scatter_(1, sequences[:, :at], True)
        p = rule.probabilities(rule.penalize(logits[:, at - 1], seen, seen.float()))
        total *= p.gather(1, sequences[:, at, None])[:, 0]
    assert total.sum().item() == pytest.approx(1.0, abs=1e-5)
    return total.view([VOCABULARY] * N_TOKENS)


def counts_of(continuations):
    counts = torch.zeros([VOCABULARY] * N_TOKENS, dtype=torch.int64)
    for tokens in continuations:
        counts[tuple(tokens)] += 1
    return counts


def count(decoder, config, sampling=SAMPLING, n=SAMPLES):
    """Return the number of times that each continuation is sampled, [V] * N_TOKENS."""
    return counts_of(
        ids(decoder, PROMPT, config, N_TOKENS, measured=COSTS, seed=seed, **sampling)
        for seed in range(n)
    )


def p_value(counts, expected):
    """Return that of a chi-square test; neighbours are merged until 8 are expected in a cell."""
    counts, expected = counts.flatten(), expected.flatten() * counts.sum()
    if counts[expected == 0].sum() > 0:  # top-p rules these out
        return 0.0
    seen, due = [0.0], [0.0]
    for count, mean in zip(counts.tolist(), expected.tolist(), strict=True):
        if due[-1] >= 8:
            seen.append(0.0)
            due.append(0.0)
        seen[-1] += count
        due[-1] += mean
    assert len(due) > 20
    scale = sum(seen) / sum(due)  # float32 sums to one within 1e-5, the test needs 1e-8
    return float(stats.chisquare(seen, [mean * scale for mean in due]).pvalue)


@pytest.mark.parametrize("config", [PREDICTION, ALL_SOURCES], ids=["prediction", "all sources"])
def test_continuations_have_the_model_s_distribution(decoder, expected, config):
    assert p_value(count(decoder, config), expected) > MIN_P_VALUE


MORE = {"temperature": 0.8, "top_k": 4, "min_p": 0.05, "repetition_penalty": 1.5}


def test_drafts_of_mixed_sources_have_the_model_s_distribution(decoder, monkeypatch):
    mix_drafts(monkeypatch)
    counts = count(decoder, ALL_SOURCES, MORE)
    assert p_value(counts, probabilities(decoder, MORE)) > MIN_P_VALUE


def test_plain_decoding_with_a_penalty_has_the_model_s_distribution(decoder):
    counts = count(decoder, PLAIN, MORE, n=400)
    assert p_value(counts, probabilities(decoder, MORE)) > MIN_P_VALUE


def test_compiled_kernels_have_the_model_s_distribution(compiled, monkeypatch):
    mix_drafts(monkeypatch)
    sampling = {"temperature": 0.7}
    counts = count(compiled, ALL_SOURCES, sampling)
    assert p_value(counts, probabilities(compiled, sampling)) > MIN_P_VALUE


def test_the_reference_has_the_model_s_distribution(decoder):
    sampling = {"temperature": 0.7}
    generator = torch.Generator().manual_seed(0)
    drafting = {"exit_layer": 1, "draft_tokens": 2, "generator": generator, **sampling}
    counts = counts_of(
        reference.generate_self_speculative(decoder, PROMPT, N_TOKENS, **drafting)
        for _ in range(400)
    )
    assert p_value(counts, probabilities(decoder, sampling)) > MIN_P_VALUE
    counts = counts_of(
        reference.generate_plain(decoder, PROMPT, N_TOKENS, generator=generator, **sampling)
        for _ in range(250)
    )
    assert p_value(counts, probabilities(decoder, sampling)) > MIN_P_VALUE


def count_rows(decoder, config, others=()):
    """Return the number of times that rows of batches have each continuation.

    Args:
        decoder: the model.
        config: of the rows that are counted.
        others: configs of as many further rows in each batch.
    """
    rows, options = [], {"max_new_tokens": N_TOKENS, **SAMPLING}
    for first in range(0, SAMPLES, 20):
        configs = [
            dataclasses.replace(config, seed=seed, **options) for seed in range(first, first + 20)
        ]
        prompts = [PROMPT] * 20 + [[1, 2, 0, 2, 1, 2]] * len(others)
        drawn = batch_ids(decoder, prompts, [*configs, *others], N_TOKENS, measured=COSTS)
        rows += drawn[:20]
    return counts_of(rows)


BATCHES = {
    "plain": PLAIN,
    "reduced head": dataclasses.replace(FIXED, draft_vocabulary=(0, 2)),
    "adaptive": ADAPTIVE,
    "all sources": ALL_SOURCES,
}
OTHERS = [PLAIN, FIXED, dataclasses.replace(ALL_SOURCES, temperature=1.0, seed=5), ADAPTIVE]


@pytest.mark.parametrize("name", BATCHES)
def test_rows_of_a_mixed_batch_have_the_model_s_distribution(decoder, expected, name):
    counts = count_rows(decoder, BATCHES[name], OTHERS)
    assert p_value(counts, expected) > MIN_P_VALUE


def test_every_source_drafts_tokens_that_are_accepted_and_rejected(decoder, monkeypatch):
    mix_drafts(monkeypatch)
    outcomes = set()
    for seed in range(60):
        for step in steps(decoder, PROMPT, ALL_SOURCES, N_TOKENS, seed=seed, **SAMPLING)[1:]:
            verified = step.sources[: step.accepted + 1]
            outcomes |= {(source, i < step.accepted) for i, source in enumerate(verified)}
            outcomes.add((step.drafted, step.accepted))
    assert outcomes >= {*itertools.product(("early-exit", "n-gram"), (True, False))}
    assert outcomes >= {(2, 0), (2, 1), (2, 2)}


# --- the power of these tests -------------------------------------------------------------------


def without_residual(draft, q, p, generator):
    """Wrong: after a rejection samples from p, not from what p has above q."""
    accepted, _ = accept_sampled(draft, q, p, generator)
    rows = p(0, draft.shape[1] + 1)
    after = rows[torch.arange(len(rows)), accepted]
    return accepted, torch.multinomial(after, 1, generator=generator)[:, 0]


def accept_all(draft, q, p, generator):
    """Wrong: accepts every draft."""
    d = draft.shape[1]
    accepted = torch.full((len(draft),), d)
    return accepted, torch.multinomial(p(d, d + 1)[:, 0], 1, generator=generator)[:, 0]


def with_another_temperature(draft, q, p, generator):
    """Wrong: compares with a q that the draft was not sampled from."""
    return accept_sampled(draft, (q.log() * 0.5).softmax(-1), p, generator)


@pytest.mark.parametrize("wrong", [without_residual, accept_all, with_another_temperature])
def test_a_wrong_acceptance_rule_is_detected(decoder, expected, wrong, monkeypatch):
    monkeypatch.setattr(loop, "accept_sampled", wrong)
    assert p_value(count_rows(decoder, FIXED), expected) < MIN_P_VALUE / 1000


@pytest.mark.long
def test_a_confidence_that_depends_on_the_sampled_token_is_detected(decoder, expected, monkeypatch):
    """Kept for its own probability, a token would be more likely than the model says."""
    propose = EarlyExit.propose

    def biased(self, draft, max_tokens):
        candidate = propose(self, draft, max_tokens)
        probability = float(candidate.probs[0][0, candidate.tokens[0, 0]])
        return Candidate(candidate.tokens, [probability], candidate.probs)

    monkeypatch.setattr(EarlyExit, "propose", biased)
    counts = count(decoder, ADAPTIVE, n=2500)
    assert p_value(counts, expected) < MIN_P_VALUE
