"""Drafts of an exit adapter: exactness, its cache, and what it proposes."""

import dataclasses

import pytest
import torch
from mixed_drafts import mix_drafts
from test_sampled_distribution import (
    COSTS,
    MIN_P_VALUE,
    N_TOKENS,
    PROMPT,
    SAMPLES,
    VOCABULARY,
    counts_of,
    p_value,
    probabilities,
)
from tiny_adapters import ADAPTER, EVERY_SOURCE, adapted_steps, tiny_adapter, with_adapter
from tiny_decoders import FREE, PLAIN, ids, model_of, random_prompt, tiny_decoder, tokens_of

import tiny_models
from layerskip.decoding import Draft, PrefixCache, exit_adapter
from layerskip.decoding.batch import Batch
from layerskip.decoding.drafters import DrafterInputs, make_drafters
from layerskip.decoding.generate import Row
from layerskip.decoding.sampling import Sampler, Sampling
from layerskip.model import native, step_timing
from layerskip.model.native import NativeDecoder

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def accepted_share(rounds):
    return sum(step.accepted for step in rounds) / max(sum(step.drafted for step in rounds), 1)


@pytest.mark.parametrize("case", tiny_models.ONE_OF_EACH)
def test_greedy_drafts_equal_plain_in_every_family(case):
    for exit_layer in (0, 2):
        decoder, adapter = with_adapter(case, exit_layer)
        prompt = random_prompt(decoder, 9)
        plain = ids(decoder, prompt, PLAIN)
        rounds = adapted_steps(decoder, adapter, prompt, ADAPTER)
        assert tokens_of(rounds) == plain
        if exit_layer:
            assert accepted_share(rounds) > 0.2


@pytest.mark.parametrize("case", tiny_models.ONE_OF_EACH)
def test_greedy_drafts_equal_plain_in_the_compiled_kernels(case, compiled_kernels):
    decoder, adapter = with_adapter(case, 2, compiled=True)
    is_native = native.supports(decoder.architecture, decoder.dtype, decoder.device)
    assert adapter.decoder.kernels == ("compiled" if is_native else "pytorch")
    prompt = random_prompt(decoder, 9)
    rounds = adapted_steps(decoder, adapter, prompt, ADAPTER)
    assert tokens_of(rounds) == ids(decoder, prompt, PLAIN)
    assert accepted_share(rounds) > 0.2


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.3}], ids=["", "penalty"])
def test_adaptive_drafts_with_n_grams_equal_plain(compiled, sampling, request):
    if compiled:
        request.getfixturevalue("compiled_kernels")
    for exit_layer in (0, 1):
        decoder, adapter = with_adapter("llama3.1", exit_layer, compiled=compiled)
        prompt = random_prompt(decoder, 5) * 3
        plain = ids(decoder, prompt, PLAIN, n=40, **sampling)
        rounds = adapted_steps(
            decoder, adapter, prompt, EVERY_SOURCE, 40, measured=FREE, **sampling
        )
        assert tokens_of(rounds) == plain
        assert any("exit-adapter" in step.sources for step in rounds)


def test_rounds_in_one_call_are_those_of_single_passes(compiled_kernels, monkeypatch):
    decoder, adapter = with_adapter("llama3.1", 0, compiled=True)
    prompt, calls = random_prompt(decoder, 5) * 3, list[int]()
    in_one_call = NativeDecoder.adapter_draft

    def counted(*args):
        calls.append(1)
        return in_one_call(*args)

    monkeypatch.setattr(NativeDecoder, "adapter_draft", counted)
    rounds = adapted_steps(decoder, adapter, prompt, EVERY_SOURCE, 40, measured=FREE)
    assert calls
    monkeypatch.setattr(exit_adapter.ExitAdapter, "drafts_in_one_call", False)
    assert adapted_steps(decoder, adapter, prompt, EVERY_SOURCE, 40, measured=FREE) == rounds


def test_drafts_of_mixed_sources_equal_plain(monkeypatch):
    mix_drafts(monkeypatch)
    decoder, adapter = with_adapter("llama3.1", 1)
    prompt = random_prompt(decoder, 6) * 2
    plain = ids(decoder, prompt, PLAIN, n=40)
    rounds = adapted_steps(
        decoder, adapter, prompt, EVERY_SOURCE, 40, datastore=tuple(plain[::2] * 3)
    )
    assert tokens_of(rounds) == plain
    assert any(len({*step.sources}) == 2 for step in rounds)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_draft_too(weights):
    decoder = tiny_decoder("llama3.1", upper=0.1, weights=weights)
    adapter = tiny_adapter(decoder, "llama3.1", 2)
    prompt = random_prompt(decoder, 9)
    rounds = adapted_steps(decoder, adapter, prompt, ADAPTER)
    assert tokens_of(rounds) == ids(decoder, prompt, PLAIN)
    assert accepted_share(rounds) > 0.2


@pytest.mark.parametrize("exit_layer", [0, 1])
def test_its_pass_is_timed_once(exit_layer, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(exit_adapter, "draft_cost", step_timing.draft_cost)
    monkeypatch.setattr(step_timing, "_drafts", {})
    monkeypatch.setattr(step_timing, "_STEADY", float("inf"))
    decoder, adapter = with_adapter("llama3.1", exit_layer)
    share = exit_adapter.head_share(decoder, adapter)
    assert 0.0 < share < float("inf")
    assert exit_adapter.head_share(decoder, adapter) == share
    assert len(list((tmp_path / "passes").iterdir())) == 1
    assert exit_adapter.head_share(decoder, adapter, token_by_token=True) > 0.0
    assert len(list((tmp_path / "passes").iterdir())) == 2


def drafter_of(decoder, adapter, prompt):
    """Return a drafter whose proposals have probabilities, as where there may be a mask."""
    sampling = Sampling(temperature=1.0)
    sampler = Sampler(sampling, decoder.device, 0, logits_mask=lambda tokens: None)
    inputs = DrafterInputs(
        decoder=decoder, sampler=sampler, prompts=[prompt], adapter=adapter, capacity=64
    )
    (drafter,) = make_drafters(["exit-adapter"], inputs)
    return drafter


def commit(decoder, drafter, cache, tokens):
    """Run tokens as the loop does, and hand their states over."""
    e = drafter.num_layers
    exit_states = decoder.run(decoder.embed(torch.tensor([tokens])), 0, e, cache)
    drafter.read_states(exit_states, decoder.run(exit_states, e, len(decoder.layers), cache))
    cache.lengths += len(tokens)


@pytest.mark.parametrize("exit_layer", [0, 2])
def test_gaps_are_filled_with_the_model_s_states(exit_layer):
    """Proposals depend on the text alone, not on the rounds in which it was committed."""
    decoder, adapter = with_adapter("llama3.1", exit_layer)
    text = random_prompt(decoder, 12)

    def proposal(*parts, drafts_between):
        drafter, cache = drafter_of(decoder, adapter, text), decoder.new_cache(64)
        for part in parts:
            commit(decoder, drafter, cache, part)
            if drafts_between:  # of a wrong token, which is rejected
                draft = Draft(torch.tensor([[7]]), cache)
                draft.extend(drafter.propose(draft, 1), 1, drafter.name)
                drafter.propose(draft, 1)
                draft.hidden_states(decoder, exit_layer)
        draft = Draft(torch.tensor([[5]]), cache)
        first = drafter.propose(draft, 1)
        draft.extend(first, 1, drafter.name)
        return torch.stack([first.probs[0], drafter.propose(draft, 1).probs[0]])

    expected = proposal(text, drafts_between=False)
    pieces = text[:4], text[4:5], text[5:9], text[9:]
    torch.testing.assert_close(proposal(*pieces, drafts_between=False), expected)


def test_drafts_of_a_sampled_answer_are_point_masses():
    decoder, adapter = with_adapter("llama3.1", 1)
    prompt = random_prompt(decoder, 8)
    proposals = []
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        sampler, cache = Sampler(sampling, decoder.device, 0), decoder.new_cache(64)
        inputs = DrafterInputs(
            decoder=decoder, sampler=sampler, prompts=[prompt], adapter=adapter, capacity=64
        )
        (drafter,) = make_drafters(["exit-adapter"], inputs)
        commit(decoder, drafter, cache, prompt)
        proposals.append(drafter.propose(Draft(torch.tensor([[5]]), cache), 1))
    greedy, sampled = proposals
    assert torch.equal(sampled.tokens, greedy.tokens)
    assert sampled.probs is None


def test_rejected_drafts_leave_no_trace():
    decoder, adapter = with_adapter("llama3.1", 1)
    text = random_prompt(decoder, 8)

    def proposals(rejected):
        drafter, cache = drafter_of(decoder, adapter, text), decoder.new_cache(64)
        commit(decoder, drafter, cache, text)
        draft = Draft(torch.tensor([[5]]), cache)
        for _ in range(rejected):
            draft.extend(drafter.propose(draft, 1), 1, drafter.name)
        draft.hidden_states(decoder, 1)
        commit(decoder, drafter, cache, [5])
        return drafter.propose(Draft(torch.tensor([[9]]), cache), 1).probs[0]

    torch.testing.assert_close(proposals(3), proposals(0))


def test_a_drafted_token_is_of_the_draft_vocabulary_or_the_prompt():
    decoder = tiny_decoder("llama3.1", upper=0.1)
    adapter = tiny_adapter(decoder, "llama3.1", 1, draft_vocabulary=(3, 4))
    prompt = [9, 10]
    drafter, cache = drafter_of(decoder, adapter, prompt), decoder.new_cache(64)
    commit(decoder, drafter, cache, prompt)
    probs = drafter.propose(Draft(torch.tensor([[5]]), cache), 1).probs[0]
    assert set(probs[0].nonzero().flatten().tolist()) <= {3, 4, 9, 10}


def test_without_an_adapter_it_cannot_draft():
    decoder = tiny_decoder("llama3.1")
    with pytest.raises(ValueError, match="no exit adapter"):
        adapted_steps(decoder, None, [1, 2], ADAPTER)


@pytest.mark.parametrize("mixed", [False, True], ids=["adapter alone", "mixed with n-grams"])
def test_sampled_continuations_have_the_model_s_distribution(mixed, monkeypatch):
    decoder = tiny_decoder("qwen2", upper=2.0, vocab_size=VOCABULARY, **SMALL)
    adapter = tiny_adapter(decoder, "qwen2", 1, (0, 2, 3), vocab_size=VOCABULARY, **SMALL)
    sampling = {"temperature": 0.5, "top_p": 0.95}
    if mixed:
        mix_drafts(monkeypatch)
    config = EVERY_SOURCE if mixed else ADAPTER
    counts = counts_of(
        tokens_of(
            adapted_steps(
                decoder, adapter, PROMPT, config, N_TOKENS,
                measured=COSTS, seed=seed, draft_tokens=2, **sampling,
            )
        )
        for seed in range(SAMPLES)
    )  # fmt: skip
    assert p_value(counts, probabilities(decoder, sampling)) > MIN_P_VALUE


def test_answers_with_a_prefix_cache_are_the_same():
    decoder, adapter = with_adapter("llama3.1", 1)
    model, prefix = model_of(decoder), PrefixCache()
    model.adapter = adapter
    text = random_prompt(decoder, 9)
    for _ in range(3):
        drafted = model.generate(text, EVERY_SOURCE, prefix=prefix, max_new_tokens=12)
        assert drafted.token_ids == model.generate(text, PLAIN, max_new_tokens=12).token_ids
        text = [*text, *drafted.token_ids, 5, 6]


@pytest.mark.parametrize("exit_layer", [0, 1])
@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
def test_rows_of_a_batch_draft_in_one_pass_what_each_would_alone(exit_layer, compiled, request):
    if compiled:
        request.getfixturevalue("compiled_kernels")
    decoder, adapter = with_adapter("llama3.1", exit_layer, compiled=compiled)
    prompts, lengths = [random_prompt(decoder, n, seed=n) for n in (5, 9, 14)], (6, 9, 40)
    batch, rounds, rows = Batch(decoder), {}, []
    for prompt, n in zip(prompts, lengths, strict=True):
        config = dataclasses.replace(ADAPTER, max_new_tokens=n)
        rows.append(Row(decoder, prompt, config, adapter=adapter))
        batch.add(rows[-1])
    for output in batch:
        rounds.setdefault(output.row, []).append(output.step)
    for row, prompt, n in zip(rows, prompts, lengths, strict=True):
        assert tokens_of(rounds[row]) == ids(decoder, prompt, PLAIN, n)
        alone = adapted_steps(decoder, adapter, prompt, ADAPTER, n)
        assert [(s.drafted, s.accepted) for s in rounds[row]] == [
            (s.drafted, s.accepted) for s in alone
        ]
    assert not exit_layer or accepted_share(rounds[rows[-1]]) > 0.2
