"""The replay of an agreement equals the real run, round by round."""

import dataclasses

import pytest
import scripted
import tiny_decoders

from layerskip.decoding import Step
from layerskip.tune.predict import Continuation, agreement_rate, read_agreement, replay

EXITS = [1, 2, 3]


def rounds(steps):
    """Steps after the first, without what the replay cannot know: the drafts that were wrong."""
    return [dataclasses.replace(step, rejected=()) for step in steps[1:]]


def tiny_model(case="llama3.1", end_tokens=()):
    decoder = tiny_decoders.tiny_decoder(case)
    return tiny_decoders.model_of(decoder, end_tokens=tuple(end_tokens))


def read(model, prompt, limit):
    answer = model.generate(prompt, mode="plain", max_new_tokens=limit)
    return read_agreement(model.decoder, prompt, answer.token_ids, EXITS, limit)


@pytest.mark.parametrize(("case", "exit_layer"), [("llama3.1", 1), ("smollm2", 2), ("qwen3", 3)])
def test_the_replay_makes_the_rounds_of_a_real_run(case, exit_layer):
    model = tiny_model(case)
    partly = 0
    for seed in range(2):
        prompt = tiny_decoders.random_prompt(model.decoder, 7 + seed, seed)
        continuation = read(model, prompt, 40)
        for d in (1, 2, 5, 16, 64):
            real = tiny_decoders.steps(
                model.decoder, prompt, tiny_decoders.speculative(exit_layer, d), 40
            )
            assert replay(continuation, exit_layer, d) == rounds(real)
            partly += any(0 < step.accepted < step.drafted for step in real)
    assert partly or exit_layer > 1  # the first exit is right now and then


def test_the_replay_ends_where_the_answer_ends():
    for draft_tokens in (1, 3, 8):
        prompt = tiny_decoders.random_prompt(tiny_decoders.tiny_decoder("llama3.1"), 7)
        full = tiny_model().generate(prompt, max_new_tokens=40).token_ids
        ended = 0
        for end in list(dict.fromkeys(full[5:]))[:8]:
            model = tiny_model(end_tokens=[end])
            if model.generate(prompt, max_new_tokens=2).new_tokens < 2:
                continue
            continuation = read(model, prompt, 40)
            real = model.generate(
                prompt,
                mode="self-speculative",
                exit_layer=2,
                draft_tokens=draft_tokens,
                max_new_tokens=40,
            )
            assert real.finish_reason == "stop"
            assert replay(continuation, 2, draft_tokens) == rounds(real.steps)
            ended += 1
        assert ended > 3


def test_rounds_and_rates_of_a_written_agreement():
    marks = [True, True, False, True, True, True, True]
    c = Continuation(
        prompt_tokens=3, token_ids=list(range(8)), limit=9, agreement={1: marks, 2: [False] * 7}
    )

    def early(tokens, drafted, accepted):
        return Step(tokens, drafted, accepted, ("early-exit",) * drafted)

    assert replay(c, 1, 2) == [early((1, 2, 3), 2, 2), early((4, 5, 6), 2, 2), early((7,), 1, 1)]
    assert replay(c, 1, 4)[0] == early((1, 2, 3), drafted=4, accepted=2)
    assert replay(c, 2, 4) == [
        early((i,), drafted=min(4, 9 - i - 1), accepted=0) for i in range(1, 8)
    ]
    assert agreement_rate([c], 1) == 6 / 7
    assert agreement_rate([c, c], 2) == 0


def test_agreement_is_read_at_the_right_positions():
    """The scripted exit errs at written places of the answer, prompt or not."""
    answer = list(range(40, 60))
    model = scripted.scripted_model(answer, misses={3, 4, 9}, prompt_tokens=5, tokenizer=None)
    given = model.generate([1] * 5, max_new_tokens=12)
    c = read_agreement(model.decoder, [1] * 5, given.token_ids, [2, 4], 12)
    assert given.token_ids == answer[:12]
    assert [i + 1 for i, mark in enumerate(c.agreement[2]) if not mark] == [3, 4, 9]
    assert c.agreement[4] == [True] * 11


def test_agreement_is_read_at_the_right_positions_of_what_takes_several_parts():
    """A prompt that is longer than one pass, and an answer that is longer than one product."""
    answer, prompt = list(range(40, 120)), [1] * 520
    model = scripted.scripted_model(
        answer, misses={3, 4, 9, 70}, prompt_tokens=len(prompt), tokenizer=None, max_context=700
    )
    given = model.generate(prompt, max_new_tokens=80)
    c = read_agreement(model.decoder, prompt, given.token_ids, [2], 80)
    assert [i + 1 for i, mark in enumerate(c.agreement[2]) if not mark] == [3, 4, 9, 70]
    assert len(c.agreement[2]) == 79


def test_the_context_bounds_drafts_like_max_new_tokens():
    model = scripted.scripted_model(range(40, 60), prompt_tokens=5, tokenizer=None, max_context=12)
    given = model.generate([1] * 5, max_new_tokens=50)
    c = read_agreement(model.decoder, [1] * 5, given.token_ids, [2], 50)
    assert (len(c.token_ids), c.limit) == (8, 8)
    config = tiny_decoders.speculative(2, 5)
    assert replay(c, 2, 5) == rounds(tiny_decoders.steps(model.decoder, [1] * 5, config, 50))
