"""Many prompts at once give what each gives alone, in float32."""

import dataclasses

import pytest
import torch
from scripted import LAYERS as SCRIPTED_LAYERS
from scripted import encode, scripted_model
from tiny_decoders import (
    FAMILIES,
    GREEDY,
    LAYERS,
    PLAIN,
    counted,
    ids,
    random_prompt,
    speculative,
    tiny_decoder,
)

import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding import Plan, PromptError, Sampling
from layerskip.decoding import generate as generate_steps
from layerskip.decoding.batch import Batch, alike, grouped
from layerskip.decoding.generate import PREFILL_CHUNK

EARLY = Plan(mode="early-exit", exit_layer=2)
ADAPTIVE = dataclasses.replace(speculative(1, 6), adaptive=True)


def batch(decoder, prompts, plan, n=24, **options):
    options = {"sampling": GREEDY, "max_new_tokens": n, **options}
    return Batch(decoder, prompts, plan=plan, **options)


def answers(made, count):
    found = [[] for _ in range(count)]
    for prompt, step in made.steps():
        found[prompt] += step.tokens
    return found


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(
    "plan", [PLAIN, EARLY, speculative(1, 4), speculative(LAYERS, 3), ADAPTIVE], ids=str
)
def test_greedy_rows_are_those_of_each_prompt_alone(case, plan):
    decoder = tiny_decoder(case)
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4, 17)]
    made = batch(decoder, prompts, plan)
    together, accepted = [[] for _ in prompts], [[] for _ in prompts]
    for prompt, step in made.steps():
        together[prompt] += step.tokens
        accepted[prompt].append(step.accepted)
    assert together == [ids(decoder, prompt, plan) for prompt in prompts]
    if plan.exit_layer == 1:  # rows of one round advanced by their own numbers of tokens
        assert any(len(set(counts)) > 1 for counts in zip(*accepted, strict=False))


@pytest.mark.parametrize("case", ["llama2", "smollm2"])  # a head of its own, and a tied one
def test_a_draft_vocabulary_has_the_tokens_of_all_prompts(case):
    decoder = tiny_decoder(case)
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4)]
    plan = dataclasses.replace(speculative(1, 4), draft_vocabulary=tuple(range(40)))
    together, drafted = [[] for _ in prompts], set()
    for prompt, step in batch(decoder, prompts, plan).steps():
        together[prompt] += step.tokens
        drafted |= {*step.tokens[: step.accepted], *step.rejected}
    assert together == [ids(decoder, prompt, PLAIN) for prompt in prompts]
    assert drafted
    assert drafted <= {*range(40), *(token for prompt in prompts for token in prompt)}


def test_an_adaptive_batch_may_be_told_not_to_draft():
    decoder = tiny_decoder("llama2")
    prompts = [random_prompt(decoder, n) for n in (2, 5)]
    made = batch(decoder, prompts, dataclasses.replace(speculative(1, 0), adaptive=True))
    assert {step.drafted for _, step in made.steps()} == {0}


@pytest.mark.parametrize("plan", [PLAIN, speculative(2, 5)], ids=str)
def test_rows_end_at_their_own_end_tokens_and_the_others_go_on(plan):
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8, 5)]
    alone = [ids(decoder, prompt, plan, n=30) for prompt in prompts]
    ends = {alone[0][2], alone[2][11]}
    expected = [ids(decoder, prompt, plan, n=30, end_tokens=ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    made = batch(decoder, prompts, plan, n=30, end_tokens=ends)
    assert answers(made, len(prompts)) == expected


def test_steps_are_those_of_each_prompt_alone():
    decoder, plan = tiny_decoder("llama3.1"), speculative(1, 3)
    prompts = [random_prompt(decoder, n, seed=n) for n in (2, 6)]
    made = [[], []]
    for prompt, step in batch(decoder, prompts, plan, n=60).steps():
        made[prompt].append(step)
    for steps, prompt in zip(made, prompts, strict=True):
        alone = list(generate_steps(decoder, prompt, plan=plan, sampling=GREEDY, max_new_tokens=60))
        # Near the end the shortest row's room cuts the drafts of all.
        assert steps[:10] == alone[:10]
        assert any(step.accepted for step in steps)


def test_a_row_that_leaves_says_no_more():
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (2, 6)]
    made = batch(decoder, prompts, speculative(1, 3))
    found = [[], []]
    for prompt, step in made.steps():
        found[prompt] += step.tokens
        if prompt == 0:
            made.leave(0)
    assert len(found[0]) == 1
    assert found[1] == ids(decoder, prompts[1], PLAIN)


def test_long_prompts_are_run_in_pieces():
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
    sampling = Sampling(temperature=1.0)

    def sample(seed):
        made = batch(decoder, prompts, speculative(1, 3), sampling=sampling, seed=seed)
        return answers(made, 3)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len({tuple(row) for row in sample(1)}) == 3


@pytest.mark.parametrize(
    ("plan", "sampling"),
    [
        (PLAIN, Sampling(repetition_penalty=1.2)),
        (Plan(mode="self-speculative", draft_tokens=3, draft_from="n-gram"), GREEDY),
        (dataclasses.replace(ADAPTIVE, draft_from="both"), GREEDY),
    ],
)
def test_what_looks_at_one_text_is_refused(plan, sampling):
    with pytest.raises(ValueError, match="a batch has no"):
        batch(tiny_decoder("llama3.1"), [[1], [2]], plan, sampling=sampling)


@pytest.mark.parametrize("upper", [0.0, 30.0], ids=["always right", "never right"])
def test_an_adaptive_batch_drafts_as_far_as_it_pays(upper):
    decoder = tiny_decoder("llama3.1", upper=upper)
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8)]
    made = batch(decoder, prompts, ADAPTIVE, n=60)
    drafted = [step.drafted for prompt, step in made.steps() if prompt == 0][1:-1]
    if upper:
        assert 0 < sum(n > 0 for n in drafted[-40:]) < 5
        assert max(drafted[-40:]) == 1
    else:
        assert set(drafted[2:]) == {6}


def test_prompts_of_very_different_lengths_are_not_continued_together():
    """What the others lack to the longest would be run as well."""
    assert grouped([20] * 8 + [4000] + [20] * 8) == [[0, 8], [1, 2, 3, 4, 5, 6, 7, *range(9, 17)]]
    assert grouped([20, 200, 2, 90]) == [[0, 1, 2, 3]]  # that costs little here
    assert grouped([3000, 900, 1000]) == [[0, 1, 2]]
    assert grouped([]) == []


def test_costs_of_a_batch_follow_its_contexts(monkeypatch):
    contexts = counted(monkeypatch)
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8)]
    answers(batch(decoder, prompts, ADAPTIVE, n=100), 2)
    assert contexts[0] == [3, 8]
    assert len(contexts) == 2
    assert max(contexts[1]) >= 8 + 64


def test_a_bad_prompt_is_refused():
    with pytest.raises(PromptError, match="empty"):
        batch(tiny_decoder("llama3.1"), [[1], []], PLAIN)


def test_rows_that_stay_move_what_is_settled_alone():
    cache = tiny_decoder("llama3.1").new_cache(4096, 3)
    cache.slots.copy_(torch.rand_like(cache.slots))
    before = cache.slots.clone()
    cache.lengths += torch.tensor([5, 40, 33])
    cache.keep_rows(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [33, 5]
    for now, (row, tiles) in enumerate([(2, 64), (0, 32)]):
        assert torch.equal(cache.slots[:, :, now, :, :tiles], before[:, :, row, :, :tiles])
        assert not cache.slots[:, :, now, :, tiles:].any()


def test_rows_move_up_in_place_where_room_is_memory():
    cache = tiny_decoder("llama3.1").new_cache(4096, 4)
    cache._is_lazy = False  # as on a GPU
    cache.slots.copy_(torch.rand_like(cache.slots))
    before, place = cache.slots.clone(), cache.slots.data_ptr()
    cache.lengths += torch.tensor([5, 40, 33, 7])
    cache.keep_rows(torch.tensor([0, 2, 3]))
    assert (cache.lengths.tolist(), cache.slots.data_ptr()) == ([5, 33, 7], place)
    for now, (row, tiles) in enumerate([(0, 32), (2, 64), (3, 32)]):
        assert torch.equal(cache.slots[:, :, now, :, :tiles], before[:, :, row, :, :tiles])
    cache.keep_rows(torch.tensor([2, 0]))  # another order is none to move up in
    assert cache.lengths.tolist() == [7, 5]
    assert torch.equal(cache.slots[:, :, 0, :, :32], before[:, :, 3, :, :32])


def test_longrope_prompts_on_both_sides_of_its_switch_are_answered_as_each_alone(tmp_path):
    tiny_models.build("phi4-mini").save_pretrained(tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32")
    rope = next(rope for rope in model.decoder.architecture.ropes if rope is not None)
    prompts = [random_prompt(model.decoder, n) for n in (rope.original_max_positions, 3)]
    assert not alike(model.decoder, prompts, 8)
    assert alike(model.decoder, prompts[1:] * 2, 8)
    together = model.generate(prompts, mode="plain", max_new_tokens=8)
    alone = [model.generate(prompt, mode="plain", max_new_tokens=8) for prompt in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]


@pytest.mark.parametrize("options", [{}, {"exit_layer": SCRIPTED_LAYERS - 1, "draft_tokens": 3}])
def test_a_list_of_prompts_ends_at_stop_strings_as_each_alone(options):
    answer = encode("one two STOP three four five six")
    model = scripted_model(answer, prompt_tokens=1)
    prompts = [[0], [0]]
    options = {**options, "stop": ["STOP"], "max_new_tokens": 20}
    together = model.generate(prompts, **options)
    alone = model.generate(prompts[0], **options)
    assert [g.text for g in together] == [alone.text] * 2
    assert [g.token_ids for g in together] == [alone.token_ids] * 2
    assert {g.finish_reason for g in together} == {"stop"}
