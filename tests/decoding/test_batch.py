"""Rows that decode together give what each gives alone, in float32, whatever else runs."""

import dataclasses
import random

import pytest
import torch
from scripted import LAYERS as SCRIPTED_LAYERS
from scripted import encode, scripted_model
from tiny_decoders import (
    ALL_DRAFTS,
    FAMILIES,
    FREE,
    LAYERS,
    NGRAMS,
    PLAIN,
    batch_ids,
    batch_steps,
    ids,
    model_of,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
    tokens_of,
)

import tiny_models
from layerskip.decoding import DecodingConfig
from layerskip.decoding.batch import Batch
from layerskip.decoding.generate import PREFILL_CHUNK, Row
from layerskip.model import load

EARLY = DecodingConfig(mode="early-exit", exit_layer=2)
ADAPTIVE = speculative(1, 6, adaptive=True)
MIXED = [PLAIN, EARLY, NGRAMS, ADAPTIVE, speculative(2, 3), speculative(LAYERS, 2), ALL_DRAFTS]


def alone(decoder, prompt, config, n=24, **options):
    """Return what a config has to give, by the simplest mode that gives it."""
    plain = dataclasses.replace(
        EARLY if config.mode == "early-exit" else PLAIN,
        exit_layer=config.exit_layer if config.mode == "early-exit" else None,
        repetition_penalty=config.repetition_penalty,
        frequency_penalty=config.frequency_penalty,
    )
    return ids(decoder, prompt, plain, n, **options)


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_rows_of_all_modes_are_those_of_each_prompt_alone(case):
    decoder = tiny_decoder(case)
    prompts = [random_prompt(decoder, n, seed=n) * 2 for n in (1, 9, 4, 17, 3, 6, 8)]
    rows = batch_steps(decoder, prompts, MIXED, measured=FREE)
    for row, prompt, config in zip(rows, prompts, MIXED, strict=True):
        assert tokens_of(row) == alone(decoder, prompt, config)
    sources = {source for row in rows for step in row for source in step.sources}
    assert sources & {"early-exit", "n-gram"}
    accepted = [[step.accepted for step in row] for row in rows]
    assert any(len(set(counts)) > 1 for counts in zip(*accepted, strict=False))


def test_a_row_alone_takes_the_steps_of_generate():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 6) * 3
    for config in MIXED:
        (row,) = batch_steps(decoder, [prompt], config, 60, measured=FREE)
        assert row == steps(decoder, prompt, config, 60, measured=FREE)


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_come_and_go_at_random(compiled, seed, request):
    """Random arrivals, lengths, options, removals and reused prefixes change no greedy answer."""
    if compiled:
        request.getfixturevalue("compiled_kernels")
    decoder, choose = tiny_decoder("llama3.1", compiled=compiled), random.Random(seed)
    batch = Batch(
        decoder,
        max_num_seqs=4,
        kv_cache_tokens=400,
        prefill_chunk=choose.choice([3, 16, 512]),
        reuse_prefixes=True,
        measured=FREE,
    )
    waiting, answers, removed = [], {}, set()
    system = random_prompt(decoder, 20, seed=seed)
    for i in range(14):
        prompt = random_prompt(decoder, choose.randint(1, 30), seed=100 * seed + i)
        prompt = [*system, *prompt] if choose.random() < 0.5 else prompt
        config = choose.choice([*MIXED, dataclasses.replace(ALL_DRAFTS, frequency_penalty=1.5)])
        config = dataclasses.replace(config, max_new_tokens=choose.randint(1, 40))
        if choose.random() < 0.25:
            config = dataclasses.replace(config, temperature=1.0, seed=i)
        waiting.append(Row(decoder, prompt, config, measured=FREE))
    rows = list(waiting)
    while waiting or batch.waiting or batch.running:
        while waiting and choose.random() < 0.4:
            row = waiting.pop()
            answers[row] = []
            batch.add(row)
        for output in batch.step():
            assert output.error is None
            assert output.row not in removed
            answers[output.row] += output.step.tokens
        assert batch.used_tokens <= 400
        if batch.running and choose.random() < 0.05:
            removed.add(choose.choice(batch.running))
            batch.remove(next(row for row in batch.running if row in removed))
    assert any(row.cached_tokens for row in rows)
    for row in rows:
        prompt, config = row.context[: row.prompt_tokens], row.config
        n = len(answers[row]) if row in removed else config.max_new_tokens
        assert len(answers[row]) == n
        if config.greedy and n:
            assert answers[row] == alone(decoder, prompt, config, n)


def test_sampled_rows_do_not_depend_on_their_neighbours():
    decoder = tiny_decoder("llama3.1")
    sampled = [
        dataclasses.replace(config, temperature=1.0, top_p=0.9, seed=7) for config in (PLAIN, EARLY)
    ]
    prompts = [random_prompt(decoder, n, seed=n) for n in (5, 8, 3, 9)]
    for config in sampled:
        first = batch_ids(decoder, prompts, [config, PLAIN, ADAPTIVE, EARLY])[0]
        assert first == batch_ids(decoder, prompts[:2], [config, NGRAMS])[0]
        assert first == ids(decoder, prompts[0], config)


def test_a_draft_vocabulary_has_the_tokens_of_the_prompts():
    decoder = tiny_decoder("smollm2")
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4)]
    config, drafted = speculative(1, 4, draft_vocabulary=tuple(range(40))), set()
    for row, prompt in zip(batch_steps(decoder, prompts, config), prompts, strict=True):
        assert tokens_of(row) == ids(decoder, prompt, PLAIN)
        drafted |= {t for s in row for t in (*s.tokens[: s.accepted], *s.rejected)}
    assert drafted & {token for prompt in prompts for token in prompt} - {*range(40)}


def test_longrope_prompts_on_both_sides_of_its_switch(tmp_path):
    tiny_models.build("phi4-mini").save_pretrained(tmp_path)
    model = model_of(load(tmp_path, dtype=torch.float32).decoder)
    rope = next(rope for rope in model.decoder.architecture.ropes if rope is not None)
    prompts = [random_prompt(model.decoder, n) for n in (rope.original_max_positions, 3)]
    options = {"mode": "plain", "max_new_tokens": 8}
    expected = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [one.token_ids for one in model.generate(prompts, **options)] == expected


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, speculative(2, 5)], ids=["plain", "speculative"])
def test_rows_end_at_their_own_end_tokens_and_the_others_go_on(config):
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8, 5)]
    without = [ids(decoder, prompt, config, n=30) for prompt in prompts]
    ends = {without[0][2], without[2][11]}
    expected = [ids(decoder, prompt, config, n=30, eos_token_ids=ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    assert batch_ids(decoder, prompts, config, 30, eos_token_ids=ends) == expected


def test_the_context_ends_rows_of_different_length():
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, decoder.architecture.max_context - 2), [5] * 5]
    first, second = batch_ids(decoder, prompts, speculative(1, 4), n=20)
    assert (len(first), len(second)) == (3, 20)


@pytest.mark.parametrize("options", [{}, {"exit_layer": SCRIPTED_LAYERS - 1, "draft_tokens": 3}])
def test_rows_end_at_stop_strings_as_each_prompt_alone(options):
    model = scripted_model(encode("one two STOP three four five six"), prompt_tokens=1)
    options = {**options, "stop": ["STOP"], "max_new_tokens": 20}
    together, one = model.generate([[0], [0]], **options), model.generate([0], **options)
    assert [answer.text for answer in together] == [one.text] * 2
    assert [answer.token_ids for answer in together] == [one.token_ids] * 2
    assert {answer.finish_reason for answer in together} == {"stop"}


# --- schedule -----------------------------------------------------------------------------------


def rounds_of(batch):
    """Return the rows of each round with the number of their prompt tokens, by prompt length."""
    rounds = []
    schedule = batch.schedule

    def record():
        failed, scheduled = schedule()
        rounds.append([(row.prompt_tokens, n) for row, n in scheduled])
        return failed, scheduled

    batch.schedule = record
    return rounds


def test_a_long_prompt_joins_in_chunks_while_the_others_go_on():
    decoder = tiny_decoder("llama3.1", max_position_embeddings=PREFILL_CHUNK + 64)
    batch = Batch(decoder, prefill_chunk=200)
    rounds, answers = rounds_of(batch), {}
    for n, prompt in ((8, 5), (4, PREFILL_CHUNK), (3, 20)):
        config = dataclasses.replace(PLAIN, max_new_tokens=n)
        answers[Row(decoder, random_prompt(decoder, prompt, seed=n), config)] = []
    for row in answers:
        batch.add(row)
    for output in batch:
        answers[output.row] += output.step.tokens
    assert rounds[:5] == [
        [(5, 5), (PREFILL_CHUNK, 195)],
        [(5, 0), (PREFILL_CHUNK, 200)],
        [(5, 0), (PREFILL_CHUNK, 117), (20, 20)],
        [(5, 0), (PREFILL_CHUNK, 0), (20, 0)],
        [(5, 0), (PREFILL_CHUNK, 0), (20, 0)],
    ]
    for row, answer in answers.items():
        assert answer == ids(decoder, row.context[: row.prompt_tokens], PLAIN, len(answer))


def test_rows_wait_for_room_and_prefixes_make_way():
    decoder = tiny_decoder("llama3.1")
    batch = Batch(decoder, kv_cache_tokens=60, reuse_prefixes=True)
    config = dataclasses.replace(PLAIN, max_new_tokens=11)
    rows = [Row(decoder, random_prompt(decoder, 20, seed=i), config) for i in range(4)]
    with pytest.raises(ValueError, match="may have 61 tokens, the KV cache holds 60"):
        batch.add(Row(decoder, [1] * 51, config))
    for row in rows:
        batch.add(row)
    most = 0
    while batch.waiting or batch.running:
        batch.step()
        most = max(most, len(batch.running))
        assert batch.used_tokens <= 60
    assert most == 2
    assert batch.active_tokens == 0
    assert batch.used_tokens == 60  # the last two texts


def test_prefixes_of_running_and_ended_rows_are_copied():
    decoder = tiny_decoder("llama3.1")
    batch = Batch(decoder, reuse_prefixes=True)
    prompt, config = random_prompt(decoder, 40), dataclasses.replace(PLAIN, max_new_tokens=10)

    def answer(prompt):
        row = Row(decoder, prompt, config)
        batch.add(row)
        tokens = [t for output in batch for t in output.step.tokens if output.row is row]
        assert tokens == ids(decoder, prompt, PLAIN, 10)
        return row

    first = answer(prompt)
    assert first.cached_tokens == 0
    assert answer([*first.context, 3, 4]).cached_tokens == 49  # all but the token never run
    assert answer([*prompt[:30], 5, 6]).cached_tokens == 30
    assert answer(prompt).cached_tokens == 39  # the last token is always computed
    early = Row(decoder, prompt, dataclasses.replace(EARLY, max_new_tokens=2))
    batch.add(early)
    list(batch)
    other = Row(decoder, prompt, config)
    batch.add(other)
    batch.step()
    assert other.cached_tokens == 39  # from the prompt whose layers all ran


def test_costs_decide_how_far_rows_draft():
    """All rows draft if positions are free; none does if each costs a step."""
    decoder = tiny_decoder("llama3.1", upper=0.0)  # drafts are always right
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8, 5, 6)]
    dear = dataclasses.replace(FREE, passes=tuple(float(n) for n in range(1, 40)))
    # Measured with the longest context: that of so small a model costs as much as its weights.
    cheap = dataclasses.replace(FREE, context=512)
    free = batch_steps(decoder, prompts, ADAPTIVE, 60, measured=cheap)
    assert all(max(step.drafted for step in row) == 6 for row in free)
    assert all(len(row) < 20 for row in free)
    for row in batch_steps(decoder, prompts, ADAPTIVE, 20, measured=dear)[:3]:
        assert len(row) == 20


def test_an_exit_that_is_never_right_is_given_up():
    decoder = tiny_decoder("llama3.1", upper=30.0)
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 8)]
    rows = batch_steps(decoder, prompts, ADAPTIVE, 80, measured=None)
    assert sum(step.drafted > 0 for step in rows[0][-40:]) < 6


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["layers", "sampler", "prompt", "drafter"])
def test_an_error_of_one_row_ends_it_alone(where, monkeypatch):
    decoder = tiny_decoder("llama3.1")
    rows = [
        Row(
            decoder,
            random_prompt(decoder, n, seed=n),
            dataclasses.replace(config, max_new_tokens=40),
        )
        for n, config in zip((4, 9, 6), (ADAPTIVE, NGRAMS, ADAPTIVE), strict=True)
    ]
    batch, answers = Batch(decoder, measured=FREE), {row: [] for row in rows}
    for row in rows:
        batch.add(row)
    bad = rows[1]
    run_rows = type(decoder).run_rows

    def failing(self, hidden, start, stop, caches):
        if any(cache is bad.cache for cache, _ in caches):
            raise RuntimeError("broken")
        return run_rows(self, hidden, start, stop, caches)

    def broken(*_):
        raise RuntimeError("broken")

    errors = []
    for i in range(100):
        if i == (0 if where == "prompt" else 3):
            if where in ("layers", "prompt"):
                monkeypatch.setattr(type(decoder), "run_rows", failing)
            elif where == "sampler":
                bad.sampler.commit = broken
            else:
                bad.drafters[0].propose = broken
        for output in batch.step():
            if output.error is not None:
                errors.append((output.row, str(output.error)))
            else:
                answers[output.row] += output.step.tokens
        if not batch.running and not batch.waiting:
            break
    assert errors == [(bad, "broken")]
    for row in (rows[0], rows[2]):
        prompt = row.context[: row.prompt_tokens]
        assert answers[row] == ids(decoder, prompt, PLAIN, 40)


def test_prompts_that_overflow_end_alone(tmp_path):
    tiny_models.build("llama3.1").save_pretrained(tmp_path)
    decoder = load(tmp_path, dtype=torch.float16).decoder
    embed = decoder.embed

    def overflow(tokens):
        scale = torch.where(tokens == 7, torch.inf, 1.0)
        return embed(tokens) * scale[..., None].to(decoder.dtype)

    decoder.embed = overflow
    batch = Batch(decoder)
    for prompt in ([1, 2], [3, 7], [4, 5]):
        batch.add(Row(decoder, prompt, dataclasses.replace(PLAIN, max_new_tokens=3)))
    errors = [str(output.error) for output in batch if output.error is not None]
    assert len(errors) == 1
    assert "not finite" in errors[0]


# --- options of rows ----------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 6)
    batch, tokens, logprobs = Batch(decoder, measured=FREE), [], []
    config = dataclasses.replace(ALL_DRAFTS, max_new_tokens=12, temperature=0.7, seed=1)
    batch.add(Row(decoder, prompt, config, num_logprobs=3))
    for output in batch:
        tokens += output.step.tokens
        logprobs += output.logprobs
    text = torch.tensor([[*prompt, *tokens]])
    hidden = decoder.run(decoder.embed(text), 0, LAYERS, decoder.new_cache(text.shape[1]))
    expected = decoder.logits(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [one.token_id for one in logprobs] == tokens
    for one, row in zip(logprobs, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        values, top = row.topk(3)
        assert [token for token, _ in one.top] == top.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("config", [PLAIN, EARLY, ALL_DRAFTS, speculative(1, 3)])
def test_a_mask_holds_for_drafts_and_the_model(config, temperature):
    """Even tokens at even positions of the answer, odd ones at odd positions."""
    decoder = tiny_decoder("llama3.1")
    size = decoder.architecture.vocab_size

    def mask(tokens):
        return torch.arange(size) % 2 == len(tokens) % 2

    config = dataclasses.replace(config, max_new_tokens=20, temperature=temperature, seed=3)
    batch, answers = Batch(decoder, measured=FREE), {}
    rows = [Row(decoder, random_prompt(decoder, n), config, logits_mask=mask) for n in (4, 7)]
    for row in rows:
        batch.add(row)
        answers[row] = []
    for output in batch:
        answers[output.row] += output.step.tokens
    assert all([t % 2 for t in answer] == [0, 1] * 10 for answer in answers.values())


def test_penalties_count_the_tokens_of_the_answer():
    """A frequency penalty subtracts for each occurrence, a presence penalty once; both after drafts."""
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 6)
    text, expected = list(prompt), []
    for _ in range(16):
        tokens = torch.tensor([text])
        hidden = decoder.run(decoder.embed(tokens), 0, LAYERS, decoder.new_cache(len(text)))
        logits = decoder.logits(hidden)[0, -1]
        counts = torch.bincount(torch.tensor(expected, dtype=torch.int64), minlength=len(logits))
        expected.append(int((logits - 0.5 * counts - 0.3 * (counts > 0)).argmax()))
        text.append(expected[-1])
    penalties = {"frequency_penalty": 0.5, "presence_penalty": 0.3}
    for config in (PLAIN, ALL_DRAFTS, speculative(1, 4)):
        assert ids(decoder, prompt, config, 16, **penalties) == expected
        assert batch_ids(decoder, [prompt, [3]], config, 16, **penalties)[0] == expected
