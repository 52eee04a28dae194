"""Many prompts at once give what each gives alone, in float32."""

import dataclasses

import pytest
import torch
from scripted import LAYERS as SCRIPTED_LAYERS
from scripted import encode, scripted_model
from tiny_decoders import (
    FAMILIES,
    LAYERS,
    NGRAMS,
    PLAIN,
    ids,
    model_of,
    random_prompt,
    record_contexts,
    speculative,
    steps,
    tiny_decoder,
)

import tiny_models
from layerskip.decoding import DecodingConfig
from layerskip.decoding.batch import Batch, grouped, same_rotary_embedding
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import load

EARLY = DecodingConfig(mode="early-exit", exit_layer=2)
ADAPTIVE = speculative(1, 6, adaptive=True)


def batch(decoder, prompts, config, n=24, eos_token_ids=(), **options):
    config = dataclasses.replace(config, max_new_tokens=n, **options)
    return Batch(decoder, prompts, config, eos_token_ids=eos_token_ids)


def answers(batch, count):
    rows = [[] for _ in range(count)]
    for row, step in batch.steps():
        rows[row] += step.tokens
    return rows


@pytest.mark.parametrize(
    ("case", "config"),
    [
        *((case, speculative(1, 4)) for case in FAMILIES),
        *(("llama3.1", config) for config in (PLAIN, EARLY, speculative(LAYERS, 3), ADAPTIVE)),
    ],
)
def test_greedy_rows_are_those_of_each_prompt_alone(case, config):
    decoder = tiny_decoder(case)
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4, 17)]
    together, accepted = [[] for _ in prompts], [[] for _ in prompts]
    for row, step in batch(decoder, prompts, config).steps():
        together[row] += step.tokens
        accepted[row].append(step.accepted)
    alone = EARLY if config is EARLY else PLAIN
    assert together == [ids(decoder, prompt, alone) for prompt in prompts]
    if config.exit_layer == 1:  # rows of one round advanced by different numbers of tokens
        assert any(len(set(counts)) > 1 for counts in zip(*accepted, strict=False))


@pytest.mark.parametrize("case", ["llama2", "smollm2"])  # an untied head, and a tied one
def test_a_draft_vocabulary_has_the_tokens_of_all_prompts(case):
    decoder = tiny_decoder(case)
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4)]
    config = speculative(1, 4, draft_vocabulary=tuple(range(40)))
    together, drafted = [[] for _ in prompts], set()
    for row, step in batch(decoder, prompts, config).steps():
        together[row] += step.tokens
        drafted |= {*step.tokens[: step.accepted], *step.rejected}
    assert together == [ids(decoder, prompt, PLAIN) for prompt in prompts]
    assert drafted
    assert drafted <= {*range(40), *(token for prompt in prompts for token in prompt)}


@pytest.mark.parametrize("config", [PLAIN, speculative(2, 5)], ids=["plain", "speculative"])
def test_rows_end_at_their_own_end_tokens_and_the_others_go_on(config):
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8, 5)]
    alone = [ids(decoder, prompt, config, n=30) for prompt in prompts]
    ends = {alone[0][2], alone[2][11]}
    expected = [ids(decoder, prompt, config, n=30, eos_token_ids=ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    assert answers(batch(decoder, prompts, config, 30, ends), len(prompts)) == expected


def test_steps_are_those_of_each_prompt_alone():
    decoder, config = tiny_decoder("llama3.1"), speculative(1, 3)
    prompts = [random_prompt(decoder, n, seed=n) for n in (2, 6)]
    rows = [[], []]
    for row, step in batch(decoder, prompts, config, n=60).steps():
        rows[row].append(step)
    for row, prompt in zip(rows, prompts, strict=True):
        # Near the end the shortest row's room cuts the drafts of all.
        assert row[:10] == steps(decoder, prompt, config, n=60)[:10]
        assert any(step.accepted for step in row)


def test_a_row_that_leaves_yields_no_more():
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (2, 6)]
    both, rows = batch(decoder, prompts, speculative(1, 3)), [[], []]
    for row, step in both.steps():
        rows[row] += step.tokens
        if row == 0:
            both.leave(0)
    assert len(rows[0]) == 1
    assert rows[1] == ids(decoder, prompts[1], PLAIN)


def test_long_prompts_run_in_chunks():
    decoder = tiny_decoder("llama3.1", max_position_embeddings=PREFILL_CHUNK + 64)
    prompts = [random_prompt(decoder, n, seed=n) for n in (PREFILL_CHUNK + 5, 3, PREFILL_CHUNK)]
    together = answers(batch(decoder, prompts, PLAIN, n=4), len(prompts))
    assert together == [ids(decoder, prompt, PLAIN, n=4) for prompt in prompts]


def test_the_context_ends_rows_of_different_length():
    decoder = tiny_decoder("llama3.1")
    context = decoder.architecture.max_context
    prompts = [random_prompt(decoder, context - 2), random_prompt(decoder, 5)]
    first, second = answers(batch(decoder, prompts, speculative(1, 4), n=20), 2)
    assert (len(first), len(second)) == (3, 20)


def test_sampling_follows_the_seed_and_differs_between_rows():
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, 6)] * 3

    def sample(seed):
        options = {"temperature": 1.0, "seed": seed}
        return answers(batch(decoder, prompts, speculative(1, 3), **options), 3)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len({tuple(row) for row in sample(1)}) == 3


@pytest.mark.parametrize("upper", [0.0, 30.0], ids=["always right", "never right"])
def test_an_adaptive_batch_drafts_as_far_as_it_pays(upper):
    decoder = tiny_decoder("llama3.1", upper=upper)
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8)]
    rounds = [
        step.drafted for row, step in batch(decoder, prompts, ADAPTIVE, 60).steps() if not row
    ]
    if upper:
        assert 0 < sum(n > 0 for n in rounds[-41:-1]) < 5
        assert max(rounds[-41:-1]) == 1
    else:
        assert set(rounds[3:-1]) == {6}


def test_configs_for_one_prompt_are_refused():
    for config in (dataclasses.replace(PLAIN, repetition_penalty=1.2), NGRAMS):
        with pytest.raises(
            ValueError, match="a batch has no repetition penalty and no drafts from"
        ):
            batch(tiny_decoder("llama3.1"), [[1], [2]], config)


def test_an_adaptive_batch_may_draft_nothing():
    decoder = tiny_decoder("llama2")
    prompts = [random_prompt(decoder, n) for n in (2, 5)]
    rounds = batch(decoder, prompts, dataclasses.replace(ADAPTIVE, draft_tokens=0)).steps()
    assert {step.drafted for _, step in rounds} == {0}


def test_costs_of_a_batch_follow_its_contexts(monkeypatch):
    contexts = record_contexts(monkeypatch)
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8)]
    answers(batch(decoder, prompts, ADAPTIVE, n=100), 2)
    assert contexts[0] == (3, 8)
    assert len(contexts) == 2
    assert max(contexts[1]) >= 8 + 64


def test_prompts_of_very_different_lengths_are_not_continued_together():
    """The padding of the shorter ones would be run as well."""
    assert grouped([20] * 8 + [4000] + [20] * 8) == [[0, 8], [1, 2, 3, 4, 5, 6, 7, *range(9, 17)]]
    assert grouped([20, 200, 2, 90]) == [[0, 1, 2, 3]]  # that costs little here
    assert grouped([3000, 900, 1000]) == [[0, 1, 2]]
    assert grouped([]) == []


@pytest.mark.parametrize("is_lazy", [True, False], ids=["cpu", "as on a GPU"])
def test_rows_that_stay_move_their_committed_positions(is_lazy):
    cache = tiny_decoder("llama3.1").new_cache(4096, 4)
    cache._is_lazy = is_lazy
    cache.slots.copy_(torch.rand_like(cache.slots))
    before, address = cache.slots.clone(), cache.slots.data_ptr()
    cache.lengths += torch.tensor([5, 40, 33, 7])
    cache.keep_rows(torch.tensor([0, 2, 3]))
    assert cache.lengths.tolist() == [5, 33, 7]
    assert (cache.slots.data_ptr() == address) == (not is_lazy)  # in place where memory is taken
    for now, (row, tiles) in enumerate([(0, 32), (2, 64), (3, 32)]):
        assert torch.equal(cache.slots[:, :, now, :, :tiles], before[:, :, row, :, :tiles])
    cache.keep_rows(torch.tensor([2, 0]))  # another order is never in place
    assert cache.lengths.tolist() == [7, 5]
    assert torch.equal(cache.slots[:, :, 0, :, :32], before[:, :, 3, :, :32])


def test_longrope_prompts_on_both_sides_of_its_switch_are_answered_as_each_alone(tmp_path):
    tiny_models.build("phi4-mini").save_pretrained(tmp_path)
    model = model_of(load(tmp_path, dtype=torch.float32).decoder)
    rope = next(rope for rope in model.decoder.architecture.ropes if rope is not None)
    prompts = [random_prompt(model.decoder, n) for n in (rope.original_max_positions, 3)]
    assert not same_rotary_embedding(model.decoder, prompts, 8)
    assert same_rotary_embedding(model.decoder, prompts[1:] * 2, 8)
    options = {"mode": "plain", "max_new_tokens": 8}
    together = model.generate(prompts, **options)
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [one.token_ids for one in together] == alone


@pytest.mark.parametrize("options", [{}, {"exit_layer": SCRIPTED_LAYERS - 1, "draft_tokens": 3}])
def test_rows_end_at_stop_strings_as_each_prompt_alone(options):
    model = scripted_model(encode("one two STOP three four five six"), prompt_tokens=1)
    options = {**options, "stop": ["STOP"], "max_new_tokens": 20}
    together, alone = model.generate([[0], [0]], **options), model.generate([0], **options)
    assert [one.text for one in together] == [alone.text] * 2
    assert [one.token_ids for one in together] == [alone.token_ids] * 2
    assert {one.finish_reason for one in together} == {"stop"}
