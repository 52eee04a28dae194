"""`LayerSkipModel`: lists of prompts, seeds, threads, interruptions, and loading."""

import concurrent.futures
import contextlib
import itertools
import os
import weakref
from unittest import mock

import numpy
import pytest
import torch
from scripted import END, OTHER_END, encode, scripted_model
from tiny_decoders import model_of, random_prompt, tiny_decoder

import tiny_checkpoint
import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding import DecodingConfig, PromptError, batch
from layerskip.decoding.placement import device_of
from layerskip.model import CheckpointSettings, Decoder
from layerskip.model.native import build as threads
from layerskip.model.quantize import WEIGHTS

SPECULATIVE = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 4}


@pytest.fixture
def model(tmp_path):
    """A checkpoint without a tokenizer, loaded from files; it has no end token."""
    tiny_models.reference("llama3.2").save_pretrained(tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32")
    return model.with_settings(CheckpointSettings())


# --- lists of prompts ---------------------------------------------------------------------------


def test_answers_to_a_list_are_those_to_each(model):
    prompts = [random_prompt(model.decoder, n, seed=n) for n in (3, 9, 1)]
    options = {"max_new_tokens": 12, **SPECULATIVE}
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [one.token_ids for one in model.generate(prompts, **options)] == alone
    config = DecodingConfig(**options)
    assert [one.token_ids for one in model.generate(prompts, config)] == alone


def test_more_prompts_than_rows_wait_for_their_turn(model, monkeypatch):
    monkeypatch.setattr(batch, "MAX_ROWS", 2)
    prompts = [random_prompt(model.decoder, n, seed=n) for n in (3, 9, 1, 12, 4)]
    options = {"max_new_tokens": 12, **SPECULATIVE}
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [one.token_ids for one in model.generate(prompts, **options)] == alone


def test_a_list_of_no_prompts(model):
    assert model.generate([]) == []
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.answer([])


# --- options ------------------------------------------------------------------------------------


def test_end_tokens_come_from_the_settings_else_from_the_tokenizer():
    assert scripted_model([0], end_tokens=(OTHER_END,)).end_tokens == {OTHER_END}
    assert scripted_model([0], end_tokens=()).end_tokens == {END}
    assert scripted_model([0], end_tokens=(), tokenizer=None).end_tokens == frozenset()


def test_without_a_tokenizer_there_are_ids_and_no_text(model):
    answer = model.generate([5], max_new_tokens=4)
    assert (answer.new_tokens, answer.text) == (4, "")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        model.generate([5], stop=["x"])
    with pytest.raises(ValueError, match="streaming text needs a tokenizer"):
        next(iter(model.stream([5])))


def test_arrays_and_end_tokens_outside_the_vocabulary_in_a_draft_vocabulary(model):
    options = {**SPECULATIVE, "max_new_tokens": 6, "temperature": 1.0, "seed": 4}
    expected = model.generate([5, 6], draft_vocabulary=30, **options).token_ids
    array = numpy.arange(30)
    assert model.generate([5, 6], draft_vocabulary=array, **options).token_ids == expected
    model.settings = CheckpointSettings(end_tokens=(10**6,), exit_layer=1)
    assert model.generate([5], draft_vocabulary=20, max_new_tokens=3).token_ids


# --- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"mode": "plain"}, SPECULATIVE])
def test_a_seed_makes_sampling_repeatable(model, mode):
    options = {"temperature": 1.0, "max_new_tokens": 16, **mode}
    state = torch.get_rng_state()
    first, again, other = (
        model.generate([5, 6], seed=seed, **options).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other
    unseeded = [model.generate([5, 6], **options).token_ids for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[1] != unseeded[2]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is unchanged


@pytest.mark.parametrize("mode", [{"mode": "plain"}, {"mode": "early-exit"}])
def test_answers_of_a_list_have_seeds_of_their_own(model, mode):
    """The last seed is followed by the first."""
    options = {"temperature": 1.0, "repetition_penalty": 1.1, "max_new_tokens": 8, **mode}
    together = model.generate([[1, 2, 3]] * 3, seed=2**64 - 1, **options)
    alone = [model.generate([1, 2, 3], seed=seed, **options) for seed in (2**64 - 1, 0, 1)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in alone}) == 3


# --- nothing in the model changes ---------------------------------------------------------------


def test_threads_share_one_model(model):
    modes = ({"mode": "plain"}, {"mode": "early-exit", "exit_layer": 1}, SPECULATIVE)
    jobs = [
        {"prompt": random_prompt(model.decoder, 3 + i, seed=i), "seed": i}
        | {"temperature": temperature, "max_new_tokens": 20 + 25 * i, **mode}
        for i in range(3)
        for temperature in (0.0, 1.0)
        for mode in modes
    ]
    alone = [model.generate(**job).token_ids for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = [one.token_ids for one in pool.map(lambda job: model.generate(**job), jobs)]
    assert together == alone


@pytest.mark.parametrize("fails_at", [0, 5])
def test_an_exception_leaves_the_model_usable(fails_at):
    model = model_of(tiny_decoder("llama3.1"))
    options = {"max_new_tokens": 12, **SPECULATIVE}
    before = model.generate([5], **options).token_ids
    state = dict(vars(model.decoder))
    run, calls = model.decoder.run, itertools.count()

    def failing(*args):
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return run(*args)

    with (
        mock.patch.object(model.decoder, "run", failing),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        model.generate([5], **options)
    assert vars(model.decoder) == state
    assert model.generate([5], **options).token_ids == before
    assert not torch.is_inference_mode_enabled()


@contextlib.contextmanager
def caches_of(decoder):
    """Collect the caches that a decoder makes, as long as they are referenced."""
    caches, new_cache = weakref.WeakSet(), decoder.new_cache

    def record(*args):
        cache = new_cache(*args)
        caches.add(cache)
        return cache

    with mock.patch.object(decoder, "new_cache", record):
        yield caches


@pytest.mark.parametrize(("options", "n_pieces"), [({"mode": "plain"}, 0), (SPECULATIVE, 3)])
def test_a_closed_answer_computes_no_more_and_frees_its_cache(model, n_pieces, options):
    before = model.generate([5], max_new_tokens=12, **options).token_ids
    with caches_of(model.decoder) as caches:
        answer = model.answer([5], max_new_tokens=12, **options)
        pieces = iter(answer)
        taken = [next(pieces).token_id for _ in range(n_pieces)]
        assert taken == before[:n_pieces]
        assert len(caches) == min(n_pieces, 1)
        answer.close()
        answer.close()
    assert len(caches) == 0
    with mock.patch.object(model.decoder, "run", None):
        assert answer.generation.token_ids == taken
        assert answer.generation.finish_reason == "interrupted"
        answer.complete()
    assert model.generate([5], max_new_tokens=12, **options).token_ids == before


def test_an_answer_left_at_its_stop_string_frees_its_cache():
    model = scripted_model(encode("abSTOPcd"))
    with caches_of(model.decoder) as caches:
        answer = model.answer([0], stop=["STOP"], mode="plain")
        for _ in answer:
            if answer.stopped:
                break
        assert answer.complete().text == "ab"
    assert len(caches) == 0


# --- the caller's PyTorch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"exit_layer": 2, "draft_vocabulary": 40}, False),
        ({"exit_layer": 2, "draft_vocabulary": 40}, True),
        ({"mode": "self-speculative", "draft_from": "n-gram", "datastore": [5, 6, 7, 5, 6]}, False),
        ({**SPECULATIVE, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01}, True),
        ({**SPECULATIVE, "repetition_penalty": 1.3}, False),
    ],
    ids=["auto", "compiled", "n-gram", "sampled", "penalty"],
)
def test_the_default_device_is_the_caller_s(options, compiled, request):
    """Nothing of the loop is made there: tensors on "meta" have no values."""
    if compiled:
        request.getfixturevalue("compiled_kernels")
    model = model_of(tiny_decoder("llama3.1", compiled=compiled))
    options = {"max_new_tokens": 16, "seed": 1, **options}
    prompts = [random_prompt(model.decoder, n) for n in (9, 3, 6)]
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            one = model.generate(prompts[0], **options).token_ids
            several = [answer.token_ids for answer in model.generate(prompts, **options)]
            results.append([one, *several])
    assert results[0] == results[1]


# --- results that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "temperature"), [([1, 2], 0.0), ([1, 2], 1.0), ([[1, 2], [3, 4, 5]], 0.0)]
)
def test_a_model_with_non_finite_results_is_refused(prompt, temperature, tmp_path):
    checkpoint = tiny_checkpoint.save(tmp_path)
    model = LayerSkipModel.from_pretrained(checkpoint, dtype="float32", compile=False)
    model.decoder.layers[-1].mlp_norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="results are not finite"):
        model.generate(prompt, temperature=temperature, max_new_tokens=4)


@pytest.mark.parametrize("prompt", [[5], [[5], [6]]], ids=["one", "batch"])
def test_an_exit_with_non_finite_results_drafts_what_is_rejected(model, prompt, monkeypatch):
    """An early exit may overflow where the whole model does not."""
    logits, calls = Decoder.logits, itertools.count()

    def broken(self, hidden):
        # The exit's head is reduced, and scores one position.
        is_exit = self is not model.decoder
        next(calls)
        return logits(self, hidden * float("nan") if is_exit else hidden)

    monkeypatch.setattr(type(model.decoder), "logits", broken)
    options = {"temperature": 0.7, "seed": 1, "max_new_tokens": 6, "draft_vocabulary": 90}
    answers = model.generate(prompt, **options, **SPECULATIVE)
    assert next(calls) > 4
    assert {one.new_tokens for one in (answers if len(prompt) > 1 else [answers])} == {6}


# --- loading ------------------------------------------------------------------------------------


def test_options_of_loading_are_checked(tmp_path):
    for option, message in (
        ({"dtype": "float8"}, "dtype is 'float8'; there are: float32, bfloat16, float16"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"weights": "3bit"}, f"weights is '3bit'; there are: {', '.join(WEIGHTS)}"),
    ):
        tiny_models.reference("llama2").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            LayerSkipModel.from_pretrained(tmp_path, **option)


def test_forked_children_of_a_cpu_model_run_single_threaded(monkeypatch):
    """PyTorch's threads are gone in a child, as those of the kernels are."""
    registered = []
    monkeypatch.setattr(
        os, "register_at_fork", lambda **functions: registered.append(functions), raising=False
    )
    threads.disable_threads_after_fork.cache_clear()
    for _ in range(2):
        scripted_model(encode("ab"))
    assert registered == [{"after_in_child": threads.run_single_threaded}]


def test_gpus_are_named_by_number(monkeypatch):
    """The current GPU depends on the thread."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of("cuda") == torch.device("cuda:3")
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:4 is not available"):
        device_of("cuda:4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="cuda is not available here; use cpu"):
        device_of("cuda")
