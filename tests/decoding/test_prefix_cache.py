"""`PrefixCache`: the common beginning of prompts is computed once, and no answer changes."""

import importlib
import threading
from unittest import mock

import pytest
import torch
from tiny_decoders import model_of, random_prompt, tiny_decoder

import tiny_models
from layerskip.decoding import PrefixCache
from layerskip.model import load

MODES = {
    "plain": {"mode": "plain"},
    "early-exit": {"mode": "early-exit", "exit_layer": 2},
    "self-speculative": {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 3},
    "n-gram": {"mode": "self-speculative", "draft_tokens": 3, "draft_from": "n-gram"},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


@pytest.fixture
def embedded(monkeypatch):
    """Return a function that counts the tokens of each pass of a decoder."""
    counts = []

    def watch(decoder):
        embed = type(decoder).embed

        def counted(self, tokens):
            counts.append(tokens.shape[1])
            return embed(self, tokens)

        monkeypatch.setattr(type(decoder), "embed", counted)
        return counts

    return watch


def turns(model, options, prefix, n=3, **more):
    """Play a conversation: each prompt is the last one, its answer, and something new."""
    prompt, answers = random_prompt(model.decoder, 40), []
    for turn in range(n):
        arguments = {**options, **more, "max_new_tokens": 10 + turn, "seed": turn}
        answer = model.answer(prompt, prefix=prefix, **arguments).complete()
        answers.append(answer.token_ids)
        prompt = [*prompt, *answer.token_ids, *random_prompt(model.decoder, 5, seed=turn)]
    return answers


@pytest.mark.parametrize(
    ("case", "options"),
    [*(("llama3.1", mode) for mode in MODES.values()), ("mistral", MODES["self-speculative"])],
)
def test_answers_are_those_of_whole_prompts(case, options):
    model = model_of(tiny_decoder(case))
    assert turns(model, options, PrefixCache()) == turns(model, options, None)


@pytest.mark.parametrize("more", [{"repetition_penalty": 1.4}, {"temperature": 1.0}])
def test_penalties_and_samples_are_the_same(more):
    model = model_of(tiny_decoder("llama3.1"))
    for options in (MODES["plain"], MODES["self-speculative"]):
        assert turns(model, options, PrefixCache(), **more) == turns(model, options, None, **more)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, MODES["plain"]), (torch.bfloat16, MODES["self-speculative"])],
)
def test_in_compiled_kernels_too_where_a_cache_grows(tmp_path, dtype, options, monkeypatch):
    monkeypatch.setattr("layerskip.decoding.prefix_cache._ROOM", 0)  # a larger one after each turn
    tiny_models.build("llama3.1").save_pretrained(tmp_path)
    model = model_of(load(tmp_path, dtype=dtype, compiled=True).decoder)
    assert turns(model, options, PrefixCache(), n=5) == turns(model, options, None, n=5)


@pytest.mark.parametrize("room", [0, 1024])
def test_only_what_is_new_is_computed(embedded, room, monkeypatch):
    monkeypatch.setattr("layerskip.decoding.prefix_cache._ROOM", room)
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    counts = embedded(model.decoder)
    answer = model.answer(prompt, prefix=prefix, max_new_tokens=10, mode="plain").complete()
    assert counts[0] == 40
    counts.clear()
    longer = [*prompt, *answer.token_ids, 3, 4]
    model.answer(longer, prefix=prefix, max_new_tokens=1, mode="plain").complete()
    assert counts == [3]  # the answer's last token and what is new
    counts.clear()
    other = [*longer[:30], (longer[30] + 1) % 90, *longer[31:]]
    model.answer(other, prefix=prefix, max_new_tokens=1, mode="plain").complete()
    assert counts == [len(other) - 30]
    counts.clear()
    model.answer(other, prefix=prefix, max_new_tokens=1, mode="plain").complete()
    assert counts == [1]  # of the same prompt its last token, after which the answer begins


def test_fewer_layers_leave_nothing_for_more(embedded):
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    counts = embedded(model.decoder)
    for options, computed in (("early-exit", 40), ("plain", 40), ("early-exit", 1)):
        counts.clear()
        model.answer(prompt, prefix=prefix, max_new_tokens=1, **MODES[options]).complete()
        assert counts == [computed]


@modes
def test_an_abandoned_answer_leaves_its_committed_tokens(options):
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    abandoned = model.answer(prompt, prefix=prefix, max_new_tokens=20, **options)
    taken = [next(iter(abandoned)).token_id for _ in range(4)]
    del abandoned
    follow = [*prompt, *taken, 5, 6]
    answer = model.answer(follow, prefix=prefix, max_new_tokens=12, **options).complete()
    assert answer.token_ids == model.generate(follow, max_new_tokens=12, **options).token_ids


def test_the_cache_belongs_to_one_answer_at_a_time():
    """An unfinished answer would write where the next one writes."""
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    options = {"prefix": prefix, "max_new_tokens": 12, "mode": "plain"}
    first = model.answer(prompt, **options)
    next(iter(first))
    second = model.answer([*prompt, 5], **options)
    next(iter(second))
    with pytest.raises(ValueError, match="another answer has begun with the same prefix"):
        first.complete()
    alone = model.generate([*prompt, 5], max_new_tokens=12, mode="plain")
    assert second.complete().token_ids == alone.token_ids
    third = model.answer([*prompt, 5, 6], **options).complete()
    assert third.token_ids == model.generate([*prompt, 5, 6], max_new_tokens=12).token_ids


@pytest.mark.parametrize("options", [MODES["plain"], MODES["self-speculative"]])
def test_an_answer_that_another_thread_is_computing_writes_to_a_cache_of_its_own(
    options, monkeypatch
):
    """It learns that another has begun only after its step."""
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    alone = model.generate([*prompt, 5], max_new_tokens=12, **options).token_ids
    begun, goes_on = threading.Event(), threading.Event()
    run = model.decoder.run

    def held_up(*arguments):
        if threading.current_thread() is thread:
            begun.set()
            assert goes_on.wait(60)
        return run(*arguments)

    def finish_first():
        with pytest.raises(ValueError, match="another answer has begun with the same prefix"):
            first.complete()
        refused.append(first)

    first = model.answer(prompt, prefix=prefix, max_new_tokens=12, **options)
    next(iter(first))
    monkeypatch.setattr(model.decoder, "run", held_up)
    refused, thread = [], threading.Thread(target=finish_first)
    thread.start()
    assert begun.wait(60)
    second = model.answer([*prompt, 5], prefix=prefix, max_new_tokens=12, **options)
    next(iter(second))
    goes_on.set()
    thread.join()
    assert refused == [first]
    assert second.complete().token_ids == alone
    follow = [*prompt, 5, *alone, 6]
    third = model.answer(follow, prefix=prefix, max_new_tokens=12, **options).complete()
    assert third.token_ids == model.generate(follow, max_new_tokens=12, **options).token_ids


def test_an_answer_that_the_garbage_collector_ends_inside_the_lock(monkeypatch):
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    first = model.answer(prompt, prefix=prefix, max_new_tokens=9, mode="plain")
    next(iter(first))
    new_cache = model.decoder.new_cache

    def collected(*arguments):
        first.close()
        return new_cache(*arguments)

    monkeypatch.setattr(model.decoder, "new_cache", collected)
    second = model.answer([9, *prompt], prefix=prefix, max_new_tokens=9, mode="plain")
    assert second.complete().new_tokens == 9


def test_ctrl_c_inside_a_step_leaves_the_cache_to_the_next_answer(monkeypatch):
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    first = model.answer(prompt, prefix=prefix, max_new_tokens=9, mode="plain")
    taken = next(iter(first)).token_id
    cache = prefix._cache
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "run", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.complete()
    follow = [*prompt, taken, 5]
    second = model.answer(follow, prefix=prefix, max_new_tokens=9, mode="plain").complete()
    assert second.token_ids == model.generate(follow, max_new_tokens=9, mode="plain").token_ids
    assert prefix._cache is cache


def test_another_model_has_no_part_in_it():
    one, other = (model_of(tiny_decoder(case)) for case in ("llama3.1", "llama2"))
    prefix, prompt = PrefixCache(), random_prompt(one.decoder, 40)
    for model in (one, other, one, other):
        result = model.answer(prompt, prefix=prefix, max_new_tokens=9).complete()
        assert result.token_ids == model.generate(prompt, max_new_tokens=9).token_ids


def test_an_answer_that_fails_leaves_nothing(embedded):
    model, prefix = model_of(tiny_decoder("llama3.1")), PrefixCache()
    prompt = random_prompt(model.decoder, 40)
    counts = embedded(model.decoder)
    answer = model.answer(prompt, prefix=prefix, max_new_tokens=9, mode="plain")
    fails = mock.Mock(side_effect=ValueError("no numbers"))
    loop = importlib.import_module("layerskip.decoding.generate")  # a function has that name too
    with (
        mock.patch.object(loop, "plain_step", fails),
        pytest.raises(ValueError, match="no numbers"),
    ):
        answer.complete()
    counts.clear()
    model.answer(prompt, prefix=prefix, max_new_tokens=1, mode="plain").complete()
    assert counts == [40]


def test_a_list_of_prompts_has_no_common_prefix():
    model = model_of(tiny_decoder("llama3.1"))
    with pytest.raises(ValueError, match="a prefix is for one prompt after another"):
        model.generate([[5, 6], [7]], prefix=PrefixCache())


def test_longrope_s_two_sides_share_nothing(tmp_path):
    """Keys of a longer context are rotated by other factors."""
    tiny_models.build("phi4-mini").save_pretrained(tmp_path)
    model = model_of(load(tmp_path, dtype=torch.float32).decoder)
    prompt = random_prompt(model.decoder, 40)
    for options in (MODES["plain"], MODES["self-speculative"]):
        result = {}
        for prefix in (PrefixCache(), None):
            short = model.answer(prompt, prefix=prefix, max_new_tokens=10, **options).complete()
            longer = [*prompt, *short.token_ids, 3, 4]
            long = model.answer(longer, prefix=prefix, max_new_tokens=30, **options).complete()
            result[prefix is None] = short.token_ids, long.token_ids
        assert result[True] == result[False]
