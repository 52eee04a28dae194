"""`LayerSkipModel`: the kinds of prompt, options, seeds, threads, and what an answer leaves behind."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import inspect
import itertools
import os
import weakref
from unittest import mock

import numpy
import pytest
import torch
from layerskip.decoding.stream import TextStream
from scripted import END, OTHER_END, TOKENIZER, encode, scripted_model
from tiny_decoders import PLAIN, ids, random_prompt, speculative, tiny_decoder
from tokenizers.processors import TemplateProcessing

import tiny_checkpoint
import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding import Answer, PromptError, Sampling, batch, generate
from layerskip.decoding.placement import device_of
from layerskip.decoding.sampling import nth_seed, seeded_generator
from layerskip.model import CheckpointSettings, Decoder
from layerskip.model.loader import fast_dtype
from layerskip.model.native import build as threads
from layerskip.model.native import native_decoder as native_decoder

SPECULATIVE = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 4}


@pytest.fixture
def model(tmp_path):
    """A checkpoint without tokenizer, by the public way; it has no end token, so it fills its room."""
    tiny_models.reference("llama3.2").save_pretrained(tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32")
    model.settings = CheckpointSettings()
    return model


# --- prompts ------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


def chatting_model(answer):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    return scripted_model(answer, tokenizer=tokenizer)


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("hey", encode("hey")),
        ([5, 6], [5, 6]),
        ((5, 6), [5, 6]),
        (list(numpy.array([5, 6])), [5, 6]),
        (MESSAGES, encode("user:hi;assistant:")),
    ],
)
def test_kinds_of_prompt(prompt, tokens):
    model = chatting_model(encode("ab"))
    assert model.tokenize(prompt) == tokens
    one = model.generate(prompt, max_new_tokens=3)
    assert one.prompt_tokens == len(tokens)
    several = model.generate([prompt, prompt], max_new_tokens=3)
    assert [each.token_ids for each in several] == [one.token_ids] * 2


def test_answers_to_a_list_are_those_to_each(model):
    prompts = [random_prompt(model.decoder, n, seed=n) for n in (3, 9, 1)]
    options = {"max_new_tokens": 12, **SPECULATIVE}
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [each.token_ids for each in model.generate(prompts, **options)] == alone


def test_a_long_list_is_answered_in_groups(model, monkeypatch):
    """Of like length, in the caller's order, and none larger than what memory was reckoned for."""
    monkeypatch.setattr(batch, "MOST_ROWS", 2)
    prompts = [random_prompt(model.decoder, n, seed=n) for n in (3, 9, 1, 12, 4)]
    groups, init = [], batch.Batch.__init__

    def seen(self, decoder, prompts, **options):
        groups.append(([len(prompt) for prompt in prompts], options["seed"]))
        init(self, decoder, prompts, **options)

    monkeypatch.setattr(batch.Batch, "__init__", seen)
    options = {"max_new_tokens": 12, **SPECULATIVE}
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [each.token_ids for each in model.generate(prompts, **options)] == alone
    assert [lengths for lengths, _ in groups] == [[9, 12], [3, 4], [1]]
    groups.clear()
    options |= {"temperature": 1.0, "seed": 7}
    made = [[each.token_ids for each in model.generate(prompts, **options)] for _ in range(2)]
    assert made[0] == made[1]
    assert [seed for _, seed in groups[:3]] == [8, 7, 9]  # of each group's first answer


def test_costs_are_weighed_for_the_rows_of_a_group(monkeypatch):
    monkeypatch.setattr(batch, "MOST_ROWS", 2)
    seen, model = [], scripted_model(encode("ab"))

    def for_batch(plan, decoder, settings, contexts):
        seen.append(contexts)
        return plan

    monkeypatch.setattr("layerskip.decoding.language_model.for_batch", for_batch)
    model.generate([[0], [0] * 5, [0] * 3], max_new_tokens=1)
    assert seen == [(5, 3)] * 2  # the shortest prompt is alone in its group


def test_a_list_of_no_prompts(model):
    assert model.generate([]) == []
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.answer([])


def test_prompts_of_a_list_are_tokenized_once(monkeypatch):
    model = scripted_model(encode("ab"))
    texts, encoded = [], model.tokenizer.encode

    def seen(text, **options):
        texts.append(text)
        return encoded(text, **options)

    monkeypatch.setattr(model.tokenizer, "encode", seen)
    model.generate(["one", "two"], max_new_tokens=2)
    assert texts == ["one", "two"]


@pytest.mark.parametrize("bad", ["", 5, [0, 10**6]])
def test_a_bad_prompt_of_a_list_is_named(bad, monkeypatch):
    model = scripted_model(encode("ab"))
    monkeypatch.setattr(model.decoder, "run", None)
    with pytest.raises(PromptError, match=r"^prompt 3: "):
        model.generate(["one", "two", bad, ""])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt is"),
        (7, "a prompt is"),
        ({"role": "user", "content": "hi"}, "a prompt is"),
        ([1.5], "a prompt is"),
        ([{"role": "user"}], "a prompt is"),
        (torch.tensor([1, 2]), "a prompt is"),
        (b"hi", "a prompt is"),
        (MESSAGES, "no chat template"),
    ],
)
def test_what_is_no_prompt(prompt, message):
    with pytest.raises(ValueError, match=message):
        scripted_model(encode("ab")).generate(prompt)


def test_special_tokens_stand_once():
    """The tokenizer's own before a text, the template's before messages."""
    model = chatting_model(encode("ab"))
    begin = model.tokenizer.convert_ids_to_tokens(OTHER_END)
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, OTHER_END)]
    )
    assert model.tokenize("hey") == [OTHER_END, *encode("hey")]
    model.tokenizer.bos_token = begin
    assert model.tokenize(f"{begin}hey") == [OTHER_END, *encode("hey")]  # one is enough
    assert model.tokenize(MESSAGES) == encode("user:hi;assistant:")


@pytest.mark.parametrize("prompt", ["text", MESSAGES])
def test_texts_need_a_tokenizer(model, prompt):
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(prompt)


def test_without_a_tokenizer_there_are_ids_and_no_text(model):
    made = model.generate([5], max_new_tokens=4)
    assert (made.new_tokens, made.text) == (4, "")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        model.generate([5], stop=["x"])
    with pytest.raises(ValueError, match="streaming text needs a tokenizer"):
        next(iter(model.stream([5])))


# --- options ------------------------------------------------------------------------------------


def test_settings_of_the_checkpoint_are_the_default():
    settings = CheckpointSettings(end_tokens=(END,), exit_layer=3, draft_tokens=2)
    model = scripted_model(encode("abcdef"), settings=settings)
    made = model.generate([0], max_new_tokens=6)
    assert (made.mode, made.exit_layer, made.draft_tokens) == ("self-speculative", 3, 12)
    made = model.generate([0], max_new_tokens=6, mode="self-speculative")
    assert (made.mode, made.exit_layer, made.draft_tokens) == ("self-speculative", 3, 2)
    made = scripted_model(encode("abcdef")).generate([0], max_new_tokens=6)
    assert (made.mode, made.exit_layer, made.draft_tokens) == ("self-speculative", None, 12)
    assert {step.source for step in made.steps} <= {"model", "n-gram"}


def test_end_tokens_come_from_the_settings_else_from_the_tokenizer():
    assert scripted_model([0], end_tokens=(OTHER_END,)).end_tokens == {OTHER_END}
    assert scripted_model([0], end_tokens=()).end_tokens == {END}
    assert scripted_model([0], end_tokens=(), tokenizer=None).end_tokens == frozenset()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mode": "fast"}, "mode"),
        ({"temperature": -1.0}, "temperature"),
        ({"exit_layer": 9}, "exit layer"),
        ({"stop": [""]}, "stop string"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 1.0}, "seed is 1.0, it has to be an integer"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', it has to be an integer"),
        ({"max_new_tokens": None}, "max_new_tokens is None, it has to be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"draft_tokens": 2.5}, "draft_tokens is 2.5"),
        ({"exit_layer": "2"}, "exit_layer is '2'"),
        ({"top_k": 1.5, "temperature": 1.0}, "top_k is 1.5"),
        ({"temperature": "hot"}, "temperature is 'hot', it has to be a number"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\]"),
        ({"repetition_penalty": False}, "repetition_penalty is False"),
        ({"draft_vocabulary": 1.5}, "draft_vocabulary is 1.5"),
        ({"draft_vocabulary": ["a"]}, "draft_vocabulary is"),
        ({"stop": 5}, "a stop string has to be a text"),
        ({"stop": [5]}, "a stop string has to be a text"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(option, message, monkeypatch):
    model = scripted_model(encode("ab"))
    monkeypatch.setattr(model.decoder, "run", None)
    with pytest.raises(ValueError, match=message):
        model.answer([0], **option)


def test_numbers_of_other_libraries_are_taken(model):
    plain = {"max_new_tokens": 6, "exit_layer": 2, "draft_tokens": 3, "top_k": 9, "seed": 4}
    others = {name: numpy.int64(value) for name, value in plain.items()}
    others["max_new_tokens"] = torch.tensor(6)
    options = {"mode": "self-speculative", "draft_vocabulary": 30, "temperature": 1.0}
    wanted = model.generate([5, 6], **plain, **options)
    options |= {"draft_vocabulary": numpy.arange(30), "temperature": numpy.float32(1.0)}
    made = model.generate([5, 6], **others, **options)
    assert made.token_ids == wanted.token_ids
    assert type(made.exit_layer) is type(made.draft_tokens) is int


@pytest.mark.parametrize("call", [LayerSkipModel.generate, LayerSkipModel.stream])
def test_signatures_show_the_options(call):
    """Whoever passes them on has the names and defaults of who takes them."""
    takes = inspect.signature(LayerSkipModel.answer).parameters
    passes = inspect.signature(call).parameters
    assert list(passes) == list(takes)
    assert {name: passes[name].default for name in passes} == {
        name: takes[name].default for name in takes
    }
    assert passes["max_new_tokens"].default == 256
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        scripted_model(encode("ab")).generate([0], max_tokens=3)


def test_pieces_say_where_each_token_came_from():
    model = scripted_model(encode("abcdefgh"), misses={3})
    pieces = list(model.answer([0], max_new_tokens=8, **SPECULATIVE))
    assert "".join(piece.text for piece in pieces) == "abcdefgh"
    drafted = "".join(piece.text for piece in pieces if piece.drafted)
    assert drafted == "bcefg"  # a: the prompt's own; d: corrected; h: the model's own
    assert [piece.token_id for piece in pieces] == encode("abcdefgh")


# --- seeds --------------------------------------------------------------------------------------


def test_rows_of_a_list_are_drawn_apart_where_they_are_answered_one_by_one(model):
    options = {"temperature": 1.0, "repetition_penalty": 1.1, "max_new_tokens": 8, "mode": "plain"}
    made = [one.token_ids for one in model.generate([[1, 2, 3]] * 3, seed=4, **options)]
    assert made == [one.token_ids for one in model.generate([[1, 2, 3]] * 3, seed=4, **options)]
    assert len({tuple(ids) for ids in made}) == 3
    assert made[0] == model.generate([1, 2, 3], seed=4, **options).token_ids


def test_the_seed_behind_the_last_is_the_first():
    assert [nth_seed(2**64 - 1, i) for i in range(3)] == [2**64 - 1, 0, 1]
    assert nth_seed(7) == 7
    assert nth_seed(None, 3) is None
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="it has to fit into 64 bits"):
            nth_seed(seed, 1)


@pytest.mark.parametrize("seed", [-1, -5, -(2**63)])
def test_a_negative_seed_draws_what_pytorch_draws(seed):
    own, plain = seeded_generator(torch.device("cpu"), nth_seed(seed)), torch.Generator()
    assert torch.equal(
        torch.rand(4, generator=own), torch.rand(4, generator=plain.manual_seed(seed))
    )


@pytest.mark.parametrize("penalty", [1.0, 1.1], ids=["together", "one by one"])
def test_the_last_seed_is_good_for_a_list(model, penalty):
    options = {"temperature": 1.0, "repetition_penalty": penalty, "max_new_tokens": 4}
    made = model.generate([[1, 2]] * 3, seed=2**64 - 1, mode="plain", **options)
    assert len(made) == 3
    if penalty != 1.0:
        alone = model.generate([1, 2], seed=1, mode="plain", **options)
        assert made[2].token_ids == alone.token_ids


@pytest.mark.parametrize("mode", [{"mode": "plain"}, {"mode": "early-exit"}, SPECULATIVE])
def test_a_seed_makes_sampling_repeatable(model, mode):
    options = {"temperature": 1.0, "max_new_tokens": 16, **mode}
    state = torch.get_rng_state()
    first, again, other = (
        model.generate([5, 6], seed=seed, **options).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other
    unseeded = [model.generate([5, 6], **options).token_ids for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[1] != unseeded[2]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is left alone


# --- nothing in the model changes ---------------------------------------------------------------


def test_threads_share_one_model(model):
    prompts = [random_prompt(model.decoder, n, seed=n) for n in range(3, 9)]
    jobs = [
        {
            "prompt": prompt,
            "seed": i,
            "temperature": temperature,
            "max_new_tokens": 20 + 25 * i,
            **mode,
        }
        for i, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
        for mode in ({"mode": "plain"}, {"mode": "early-exit", "exit_layer": 1}, SPECULATIVE)
    ]
    alone = [model.generate(**job).token_ids for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = [made.token_ids for made in pool.map(lambda job: model.generate(**job), jobs)]
    assert together == alone


def test_time_to_the_first_token_is_each_answers_own(model, monkeypatch):
    """Prompts that are answered one after the other do not count each other's time."""
    ticks = itertools.count()
    monkeypatch.setattr("layerskip.decoding.answer.device_clock", lambda _: lambda: next(ticks))
    answers = model.generate([[5], [6], [7]], max_new_tokens=9, repetition_penalty=1.1)
    assert [answer.ttft_s for answer in answers] == [1, 1, 1]


def test_time_to_the_first_token_of_a_batch_is_that_of_its_pass(model, monkeypatch):
    """Not of the other prompts' tokenizing and planning."""
    ticks = itertools.count()
    monkeypatch.setattr("layerskip.decoding.answer.device_clock", lambda _: lambda: next(ticks))
    answers = model.generate([[5], [6], [7]], max_new_tokens=2, mode="plain")
    assert [answer.ttft_s for answer in answers] == [3, 3, 3]


def test_a_conversation_may_have_tools_and_variables_of_the_template():
    model = chatting_model([0])
    model.tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}{{ mood or '' }}"
        "{% for m in messages %}{{ m.content or m.tool_calls }};{% endfor %}"
    )
    asked = {"messages": MESSAGES, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "!"}}
    assert model.tokenize(asked) == encode("[f]!hi;")
    assert model.tokenize({"messages": MESSAGES}) == model.tokenize(MESSAGES) == encode("hi;")
    called = [*MESSAGES, {"role": "assistant", "tool_calls": "f()"}]
    assert model.tokenize(called) == encode("hi;f();")
    one, other = model.generate([asked, {"messages": MESSAGES}], max_new_tokens=1)
    assert (one.prompt_tokens, other.prompt_tokens) == (7, 3)
    asked["tools"], asked["chat_template_kwargs"] = '[{"name": "f"}]', '{"mood": "!"}'
    assert model.tokenize(asked) == encode("[f]!hi;")
    for more in ({"tools": "["}, {"tools": [1]}, {"chat_template_kwargs": {"tokenize": True}}):
        with pytest.raises(PromptError, match="the chat template refuses these messages: "):
            model.tokenize({**asked, **more})
    for wrong in ({"messages": MESSAGES, "tool": []}, {"messages": "hi"}, {"messages": []}, {}):
        with pytest.raises(
            ValueError, match=r"a prompt is a text, token ids, messages .* or a dict"
        ):
            model.tokenize(wrong)


def test_messages_that_the_template_refuses():
    model = chatting_model(encode("ab"))
    model.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match="refuses these messages: no system message"):
        model.generate(MESSAGES)
    model.tokenizer.chat_template = "{{ 'user: ' + messages[0].content }}"
    with pytest.raises(ValueError, match="refuses these messages: can only concatenate str"):
        model.generate([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])


def test_an_interrupted_answer_has_the_text_of_its_tokens(monkeypatch):
    model = scripted_model(encode("abcdef"))
    answer = model.answer([0], mode="plain", max_new_tokens=6, stop=None)

    def interrupted(step):
        take(step)
        if len(answer.generation.token_ids) == 3:
            raise KeyboardInterrupt

    take = answer.take
    monkeypatch.setattr(answer, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer.complete()
    assert answer.generation.text == "abc"
    assert "".join(piece.text for piece in answer) == "def"


def test_an_answer_interrupted_inside_a_character_has_the_text_before_it():
    model = scripted_model([*encode("ab"), *encode("\N{EURO SIGN}")[:2]])
    answer = model.answer([0], mode="plain", max_new_tokens=5)
    for step in itertools.islice(answer._loop, 4):
        answer.take(step)
    assert len(answer.generation.token_ids) == 4
    assert answer.generation.text == "ab"


def test_a_draft_text_with_tokens_that_the_model_lacks():
    model = scripted_model([1], vocab_size=80)
    assert max(encode("zz")) >= 80
    with pytest.raises(ValueError, match="token ids of 0 to 79"):
        model.answer([0], draft_from="n-gram", draft_text="zz")


def test_bad_draft_vocabularies(model):
    model.settings = CheckpointSettings(end_tokens=(10**6,), exit_layer=1)  # no such token
    assert model.generate([5], draft_vocabulary=20, max_new_tokens=3).token_ids
    with pytest.raises(ValueError, match="1 or more tokens"):
        model.generate([5], draft_vocabulary=-1)


def test_two_answers_in_turns(model):
    """Loops that are advanced alternately, in one thread, do not see each other."""
    options = {"max_new_tokens": 12, **SPECULATIVE}
    alone = [model.generate([t], **options).token_ids for t in (5, 6)]
    answers = [model.answer([t], **options) for t in (5, 6)]
    pieces = [iter(answer) for answer in answers]
    for _ in range(12):
        for turn in pieces:
            next(turn)
    assert [answer.generation.token_ids for answer in answers] == alone


def weights_of(decoder):
    tensors = [decoder.final_norm.weight]
    for layer in decoder.layers:
        for product in (layer.qkv, layer.attention_out, layer.mlp.gate_up, layer.mlp.down):
            every = torch.eye(product.shape[1])
            tensors += [product(every), layer.attention_norm.weight, layer.mlp_norm.weight]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5, 9])
def test_an_exception_leaves_the_model_usable(model, fails_at):
    options = {"max_new_tokens": 12, **SPECULATIVE}
    before = model.generate([5], **options).token_ids
    weights, state = weights_of(model.decoder), dict(vars(model.decoder))
    run, calls = model.decoder.run, []

    def failing(*args):
        calls.append(args)
        if len(calls) > fails_at:
            raise RuntimeError("out of memory")
        return run(*args)

    with (
        mock.patch.object(model.decoder, "run", failing),
        mock.patch.object(type(model.decoder), "verify", Decoder.verify),  # in its parts
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        model.generate([5], **options)
    assert vars(model.decoder) == state
    assert all(map(torch.equal, weights_of(model.decoder), weights))
    assert model.generate([5], **options).token_ids == before
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("n_pieces", [0, 1, 3])
def test_an_abandoned_answer_leaves_the_model_usable(model, n_pieces):
    options = {"max_new_tokens": 12, **SPECULATIVE}
    before = model.generate([5], **options).token_ids
    answer = model.answer([5], **options)
    pieces = iter(answer)
    for _ in range(n_pieces):
        next(pieces)
    pieces.close()
    made = answer.generation
    assert made.token_ids == before[:n_pieces]
    assert model.generate([5], **options).token_ids == before


@contextlib.contextmanager
def caches_of(decoder):
    """The caches that a decoder makes meanwhile, as long as somebody holds them."""
    caches, new_cache = weakref.WeakSet(), decoder.new_cache

    def seen(*arguments):
        cache = new_cache(*arguments)
        caches.add(cache)
        return cache

    with mock.patch.object(decoder, "new_cache", seen):
        yield caches


@pytest.mark.parametrize("options", [{"mode": "plain"}, SPECULATIVE])
@pytest.mark.parametrize("n_pieces", [0, 1, 3])
def test_a_closed_answer_computes_no_more_and_lets_its_cache_go(model, n_pieces, options):
    with caches_of(model.decoder) as caches:
        answer = model.answer([5], max_new_tokens=12, **options)
        pieces = iter(answer)
        said = [next(pieces).token_id for _ in range(n_pieces)]
        assert len(caches) == min(n_pieces, 1)
        answer.close()
        answer.close()
    assert len(caches) == 0
    with mock.patch.object(model.decoder, "run", None):
        assert answer.generation.token_ids == said
        assert answer.generation.finish_reason == "interrupted"
        answer.complete()
    assert model.generate([5], max_new_tokens=12, **options).new_tokens == 12


def test_an_answer_that_is_left_at_its_stop_string_lets_its_cache_go():
    model = scripted_model(encode("abSTOPcd"))
    with caches_of(model.decoder) as caches:
        answer = model.answer([0], stop=["STOP"], mode="plain")
        for _ in answer:
            if answer.stopped:
                break
        assert answer.complete().text == "ab"
    assert len(caches) == 0


@pytest.mark.parametrize(("tokens", "end"), [(2, "length"), (3, "stop")])
def test_an_answer_that_is_left_at_its_last_token_has_its_text(tokens, end):
    """What could have begun a stop string is text where nothing more comes."""
    answer = scripted_model([*encode("aS"), END]).answer([0], stop=["STOP"], max_new_tokens=tokens)
    pieces = iter(answer)
    said = "".join(next(pieces).text for _ in range(tokens))
    assert (answer.generation.text, answer.generation.finish_reason) == ("aS", end)
    assert said + "".join(piece.text for piece in pieces) == "aS"


@pytest.mark.parametrize("compile", [False, True], ids=["PyTorch", "compiled"])
@pytest.mark.parametrize("prompt", [[5], [[5], [6]]], ids=["one", "batch"])
def test_a_draft_that_is_no_number_is_refused(prompt, compile, tmp_path, request, monkeypatch):
    """A hidden state may overflow behind a token that is drafted, and refused."""
    if compile:
        request.getfixturevalue("compiled_kernels")
    tiny_models.reference("llama3.2").save_pretrained(tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32", compile=compile)
    model.settings = CheckpointSettings()
    place, name = (native_decoder, "Drawing") if compile else (Decoder, "distributions")
    plain, calls = getattr(place, name), itertools.count(1)

    def drawing(heads, pointers, draws, rows):
        broken = dataclasses.replace(draws, temperature=float("nan"))
        return plain(heads, pointers, broken if next(calls) == 2 else draws, rows)

    def distributions(self, hidden, temperature):
        is_second_draft = hidden.shape[1] == 1 and next(calls) == 3
        return plain(self, hidden * float("nan") if is_second_draft else hidden, temperature)

    monkeypatch.setattr(place, name, drawing if compile else distributions)
    options = {"temperature": 0.7, "seed": 1, "max_new_tokens": 6, "draft_vocabulary": 0}
    answers = model.generate(prompt, **options, **SPECULATIVE)
    assert next(calls) > 4
    assert {g.new_tokens for g in (answers if len(prompt) > 1 else [answers])} == {6}


def test_a_stream_that_is_closed_closes_its_answer(monkeypatch):
    model, closed = scripted_model(encode("abcdef")), []
    close = Answer.close
    monkeypatch.setattr(Answer, "close", lambda self: closed.append(close(self)))
    stream = model.stream([0], mode="plain", max_new_tokens=6)
    assert next(stream) == "a"
    assert closed == []
    stream.close()
    assert closed == [None]
    assert list(model.stream([0], mode="plain", max_new_tokens=6)) == list("abcdef")


@pytest.mark.parametrize("fails_at", range(12))
@pytest.mark.parametrize("ends", ["pieces", "complete"])
@pytest.mark.parametrize("stop", [(), ("Z",)])
def test_ctrl_c_while_text_is_made_loses_and_doubles_nothing(fails_at, ends, stop, monkeypatch):
    text = "abcdefghijkl"
    model, calls = scripted_model(encode(text), misses={4}), itertools.count()
    answer = model.answer([0], max_new_tokens=len(text), stop=stop, **SPECULATIVE)
    decode = TextStream._decode

    def interrupted(self, tokens):
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return decode(self, tokens)

    monkeypatch.setattr(TextStream, "_decode", interrupted)
    said = ""
    for _ in range(2):  # the second time nothing interrupts
        with contextlib.suppress(KeyboardInterrupt):
            if ends == "complete":
                answer.complete()
            for piece in answer:
                said += piece.text
        with contextlib.suppress(KeyboardInterrupt):
            made = answer.generation
            assert made.token_ids == encode(text)[: made.new_tokens]
            assert [token for step in made.steps for token in step.tokens] == made.token_ids
    made = answer.generation
    assert (made.token_ids, made.text) == (encode(text), text)
    assert [token for step in made.steps for token in step.tokens] == made.token_ids
    if ends == "pieces":
        assert said == text


@pytest.mark.parametrize("plan", [PLAIN, speculative(2, 4)])
def test_inference_mode_is_the_loop_s_own(plan):
    """Between two steps the caller may train something."""
    decoder = tiny_decoder("llama2")
    weight = torch.ones(3, requires_grad=True)
    options = {"plan": plan, "sampling": Sampling(), "max_new_tokens": 6}
    for _ in generate(decoder, [5], **options):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        (weight * weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        for _ in generate(decoder, [5], **options):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("prompt", [[5, 6], [[5], [6, 7]]], ids=["one", "batch"])
@pytest.mark.parametrize("mode", [{"mode": "plain"}, SPECULATIVE])
def test_autocast_of_the_caller_is_not_the_loop_s(model, prompt, mode, monkeypatch):
    """It would make bfloat16 of the products of a float32 model."""
    run, seen = model.decoder.run, set()

    def watched(*arguments):
        seen.add(torch.is_autocast_enabled("cpu"))
        return run(*arguments)

    monkeypatch.setattr(model.decoder, "run", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(prompt, max_new_tokens=6, **mode)
        assert torch.is_autocast_enabled("cpu")
        next(iter(model.answer([5, 6], max_new_tokens=6, **mode)))
        assert torch.is_autocast_enabled("cpu")
    assert seen == {False}


DEFAULT_DEVICE_CASES = {
    "plain": {"mode": "plain"},
    "early-exit": {"mode": "early-exit", "exit_layer": 2},
    "self-speculative": SPECULATIVE,
    "auto": {"exit_layer": 2, "draft_vocabulary": 40},
    "n-gram": {"mode": "self-speculative", "draft_from": "n-gram", "draft_text": [5, 6, 7, 5, 6]},
    "sampled": {**SPECULATIVE, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalty": {**SPECULATIVE, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("case", DEFAULT_DEVICE_CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
def test_the_default_device_is_the_caller_s(case, compiled, tmp_path, request):
    """What it makes is none of the loop's: "meta" has no numbers at all."""
    if compiled:
        request.getfixturevalue("compiled_kernels")
    tiny_models.reference("llama3.2").save_pretrained(tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32", compile=compiled)
    options = {"max_new_tokens": 16, "seed": 1, **DEFAULT_DEVICE_CASES[case]}
    prompts = [random_prompt(model.decoder, n) for n in (9, 3, 6)]
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            one = model.generate(prompts[0], **options).token_ids
            several = [made.token_ids for made in model.generate(prompts, **options)]
            found.append([one, *several])
    assert found[0] == found[1]


def test_gradients_are_not_recorded_in_the_loop(monkeypatch):
    decoder = tiny_decoder("llama2")
    run, modes = decoder.run, []

    def watched(*args):
        modes.append(torch.is_inference_mode_enabled())
        return run(*args)

    monkeypatch.setattr(decoder, "run", watched)
    ids(decoder, [5], speculative(2, 4))
    assert set(modes) == {True}


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; there are: float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype is 'float64'"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"weights": "3bit"}, "weights is '3bit'; there are: 16bit, int8, int4"),
    ],
)
def test_options_of_loading_are_checked(tmp_path, option, message):
    tiny_models.reference("llama2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LayerSkipModel.from_pretrained(tmp_path, **option)


def test_whatever_runs_a_cpu_model_its_forked_children_work_alone(monkeypatch):
    """PyTorch's threads are gone in a child as those of the kernels are."""
    registered = []
    monkeypatch.setattr(
        os, "register_at_fork", lambda **told: registered.append(told), raising=False
    )
    threads.disable_threads_after_fork.cache_clear()
    for _ in range(2):
        scripted_model(encode("ab"))
    assert registered == [{"after_in_child": threads.run_single_threaded}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_said(tmp_path):
    with pytest.raises(ValueError, match="cuda is not available here; use cpu"):
        LayerSkipModel.from_pretrained(tmp_path, device="cuda")


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2], [3, 4, 5]]], ids=["one", "batch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_numbers_are_none_is_refused(prompt, temperature, tmp_path):
    model = LayerSkipModel.from_pretrained(
        tiny_checkpoint.save(tmp_path), dtype="float32", compile=False
    )
    model.decoder.final_norm.weight.fill_(1.0)
    model.decoder.layers[-1].mlp_norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="results are not finite"):
        model.generate(prompt, temperature=temperature, max_new_tokens=4)


def test_half_an_emoji_is_no_prompt(tmp_path):
    model = LayerSkipModel.from_pretrained(tiny_checkpoint.save(tmp_path), compile=False)
    with pytest.raises(PromptError, match="cannot be made tokens of"):
        model.tokenize("x \ud83d")


def test_a_gpu_is_named_by_its_number(monkeypatch):
    """Which one "cuda" is depends on the thread that asks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of("cuda") == torch.device("cuda:3")
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:4 is not available"):
        device_of("cuda:4")


def test_a_gpu_without_bfloat16_has_float16(monkeypatch):
    architecture, gpu = tiny_decoder("llama3.1").architecture, torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        asked = mock.Mock(return_value=has_it)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
        assert fast_dtype(architecture, gpu) == dtype
        asked.assert_called_with(including_emulation=False)
