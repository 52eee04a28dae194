"""Where an answer ends: end tokens, stop strings, max_new_tokens, and the context."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import (
    END,
    LAYERS,
    OTHER_END,
    TOKENIZER,
    ScriptedDecoder,
    encode,
    scripted_model,
    words,
)
from tiny_decoders import GREEDY, PLAIN, ids, random_prompt, speculative, tiny_decoder

from layerskip.decoding import PromptError, generate

MODES = [
    {"mode": "plain"},
    *({"exit_layer": LAYERS - 1, "draft_tokens": d} for d in (0, 1, 3, 8)),
    *(
        {"mode": "self-speculative", "exit_layer": LAYERS - 1, "draft_tokens": d}
        for d in (0, 1, 3, 8)
    ),
]
MISSES = (5, 6, 11)


def every_mode(answer, *, prompt=(0,), options=None, **script):
    """The answer in every mode, which has to be the same; the longest drafts' one is returned."""
    model = scripted_model(answer, misses=MISSES, prompt_tokens=len(prompt), **script)
    made = [model.generate(list(prompt), **mode, **(options or {})) for mode in MODES]
    for one in made:
        assert (one.token_ids, one.text, one.finish_reason) == (
            made[0].token_ids,
            made[0].text,
            made[0].finish_reason,
        )
        # The steps hold what was answered, no more and no less.
        assert [token for step in one.steps for token in step.tokens] == one.token_ids
        assert all(step.accepted <= min(step.drafted, len(step.tokens)) for step in one.steps)
    return made[-1]


@pytest.mark.parametrize("at", range(14))
def test_end_token_wherever_it_falls(at):
    """First token, in an accepted draft, at its end, the model's own: the answer ends with it."""
    answer = [*encode("a" * at), END, *encode("b" * 20)]
    made = every_mode(answer)
    assert made.token_ids == answer[: at + 1]
    assert (made.text, made.finish_reason) == ("a" * at, "stop")


@pytest.mark.parametrize("ends", [(END, OTHER_END), (OTHER_END, END)])
def test_the_earliest_of_several_end_tokens(ends):
    answer = [*encode("ab"), OTHER_END, END, *encode("cd")]
    assert every_mode(answer, end_tokens=ends).token_ids == answer[:3]


def test_an_end_token_that_is_not_declared_goes_on():
    answer = [*encode("ab"), OTHER_END, *encode("cd"), END]
    assert every_mode(answer, end_tokens=(END,)).token_ids == answer


def test_end_token_as_the_last_token_allowed():
    made = every_mode([*encode("abc"), END], options={"max_new_tokens": 4})
    assert (made.new_tokens, made.finish_reason) == (4, "stop")
    made = every_mode([*encode("abc"), END], options={"max_new_tokens": 3})
    assert (made.new_tokens, made.finish_reason) == (3, "length")


def test_ignore_eos_goes_on():
    answer = [*encode("ab"), END]
    made = every_mode(answer, options={"ignore_eos": True, "max_new_tokens": 7})
    assert made.token_ids == (answer * 3)[:7]
    assert (made.text, made.finish_reason) == ("ababa", "length")


STOPS = [
    # answer, stop, text, tokens
    (encode("one. two"), ["."], "one", 4),
    (encode("oneENDtwo"), "END", "one", 6),  # a single string is one stop string
    (words("hello", "Ġworld", "ab"), ["lo wo"], "hel", 2),
    (encode("abcdefgh"), ["gh", "de", "z"], "abc", 5),
    (encode("a漢b漢"), ["b"], "a漢", 5),
    (encode("ab"), ["ab"], "", 2),
]


@pytest.mark.parametrize(("answer", "stop", "text", "n_tokens"), STOPS)
def test_stop_strings(answer, stop, text, n_tokens):
    made = every_mode(answer, options={"stop": stop, "max_new_tokens": 12})
    assert (made.text, made.new_tokens, made.finish_reason) == (text, n_tokens, "stop")


@pytest.mark.parametrize("before", range(12))
def test_stop_string_wherever_it_falls_in_a_draft(before):
    answer = encode("x" * before + "END" + "y" * 20)
    made = every_mode(answer, options={"stop": ["END"]})
    assert (made.text, made.token_ids) == ("x" * before, answer[: before + 3])


@pytest.mark.parametrize(("stop_at", "end_at"), [(2, 5), (5, 2)])
def test_stop_string_or_end_token_whichever_is_first(stop_at, end_at):
    answer = encode("a" * 8)
    answer[stop_at : stop_at + 1] = encode("S")
    answer[end_at] = END
    made = every_mode(answer, options={"stop": ["S"]})
    assert (made.text, made.new_tokens) == ("a" * 2, 3)


@pytest.mark.parametrize("options", [{}, {"stop": ["S"], "ignore_eos": True}])
@pytest.mark.parametrize("at", [9, 12, 15])
def test_nothing_is_drafted_beyond_the_end(at, options):
    answer = [*encode("x" * at), *(encode("S") if options else [END]), *encode("y" * 20)]
    model = scripted_model(answer)
    made = model.generate([0], exit_layer=1, draft_from="early-exit", **options)
    assert made.token_ids == answer[: at + 1]
    assert max(step.accepted for step in made.steps) >= 3
    assert [step for step in made.steps if step.from_exit > step.drafted] == []


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    for answer, options in (
        ([*encode("xEN"), END], {"stop": ["END"]}),
        (encode("xEN"), {"stop": ["END"], "max_new_tokens": 3}),
    ):
        assert every_mode(answer, options=options).text == "xEN"


@given(
    text=st.text(alphabet="abé", min_size=1, max_size=20),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    misses=st.sets(st.integers(0, 30)),
    d=st.integers(0, 6),
)
def test_streaming_never_shows_a_stop_string(text, stop, misses, d):
    answer = [*encode(text), END]
    model = scripted_model(answer, misses=misses)
    plain = model.generate([0], mode="plain", stop=stop)
    options = {"exit_layer": 1, "draft_tokens": d, "stop": stop}
    assert model.generate([0], **options).token_ids == plain.token_ids
    shown = ""
    for piece in model.stream([0], **options):
        shown += piece
        assert plain.text.startswith(shown)
    assert shown == plain.text
    assert not any(one in shown for one in stop)


@pytest.mark.parametrize("mode", ["plain", "self-speculative"])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_string_may_name_a_special_token(mode, ignore_eos):
    answer = [*encode("ab"), OTHER_END, *encode("cd")]
    model = scripted_model(answer, end_tokens=(END,))
    options = {"mode": mode, "stop": ["x", "<other end>"], "ignore_eos": ignore_eos}
    made = model.generate([0], max_new_tokens=5, **options)
    assert (made.text, made.token_ids, made.finish_reason) == ("ab", answer[:3], "stop")
    assert model.generate([0], mode=mode, max_new_tokens=5).text == "abcd"
    together = model.generate([[0], [0]], max_new_tokens=5, **options)
    assert [one.text for one in together] == ["ab", "ab"]


def test_an_answer_that_is_given_up_has_what_was_taken_of_it():
    model = scripted_model(encode("abcdefghij"))
    answer = model.answer([0], mode="self-speculative", exit_layer=3, draft_tokens=8)
    pieces = iter(answer)
    assert [next(pieces).text for _ in range(4)] == ["a", "b", "c", "d"]
    pieces.close()
    made = answer.generation
    assert (made.text, made.token_ids, made.finish_reason) == (
        "abcd",
        encode("abcd"),
        "interrupted",
    )
    assert [token for step in made.steps for token in step.tokens] == made.token_ids
    # And whoever goes on has the rest.
    whole, again = model.generate([0], mode="plain", max_new_tokens=256), answer.complete()
    assert (again.text, again.token_ids) == (whole.text, whole.token_ids)
    assert [token for step in again.steps for token in step.tokens] == whole.token_ids
    drafting = {"mode": "self-speculative", "exit_layer": 3, "draft_tokens": 8}
    assert again.rounds == model.generate([0], **drafting).rounds


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
@pytest.mark.parametrize("d", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_small_numbers(max_new_tokens, d, length):
    """max_new_tokens=1, d=0 and a prompt of one token work, in any combination."""
    decoder = tiny_decoder("llama2")
    prompt = random_prompt(decoder, length)
    made = ids(decoder, prompt, speculative(2, d), max_new_tokens)
    assert len(made) == max_new_tokens
    assert made == ids(decoder, prompt, PLAIN, 20)[:max_new_tokens]


@pytest.mark.parametrize("room", [0, 1, 2, 9])
def test_the_context_ends_the_answer(room):
    """A prompt as long as the context still gets the one token that needs no place in it."""
    prompt = [0] * (64 - room)
    made = every_mode(encode("abc"), prompt=prompt, max_context=64)
    assert (made.new_tokens, made.finish_reason) == (room + 1, "length")


@pytest.mark.parametrize("plan", [PLAIN, speculative(1, 5)])
def test_a_full_context_with_a_real_decoder(plan):
    decoder = tiny_decoder("qwen2", max_position_embeddings=24)
    prompt = random_prompt(decoder, 24)
    roomy = tiny_decoder("qwen2", max_position_embeddings=64)
    assert ids(decoder, prompt, plan) == ids(roomy, prompt, PLAIN, 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([0] * 65, "65 tokens, this model's context holds 64"),
        ([0, 300], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt, message):
    model = scripted_model(encode("a"))
    with pytest.raises(PromptError, match=message):
        model.answer(prompt)
    with pytest.raises(PromptError, match=f"prompt 2: .*{message}"):
        model.generate([[0], prompt])
    with pytest.raises(PromptError, match=message):
        next(generate(model.decoder, prompt, plan=PLAIN, sampling=GREEDY, max_new_tokens=1))


def test_an_empty_text_is_an_empty_prompt():
    with pytest.raises(PromptError, match="empty"):
        scripted_model(encode("a")).generate("")


def test_an_empty_text_is_whatever_the_tokenizer_begins_with(monkeypatch):
    model = scripted_model(encode("ab"))
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, **_: [7] if text == "" else 1 / 0)
    assert model.tokenize("") == [7]
    assert model.generate("", max_new_tokens=2).text == "ab"


@pytest.mark.parametrize("n", [0, -3])
def test_max_new_tokens_below_one_is_refused(n):
    model = scripted_model(encode("a"))
    message = f"max_new_tokens is {n}"
    with pytest.raises(ValueError, match=message):
        model.generate([0], max_new_tokens=n)
    with pytest.raises(ValueError, match=message):
        next(generate(model.decoder, [0], plan=PLAIN, sampling=GREEDY, max_new_tokens=n))


def test_the_script_errs_where_it_should():
    """The tests here rest on it: a miss in the draft, never in the answer."""
    decoder = ScriptedDecoder(encode("abcdef"), misses={2, 3})
    cache = decoder.new_cache(8)
    draft, whole = (
        decoder.logits(decoder.run(decoder.embed(cache.slots.new_zeros(1, 6)), 0, n, cache))
        .argmax(-1)[0]
        .tolist()
        for n in (1, LAYERS)
    )
    assert TOKENIZER.decode(whole) == "abcdef"
    differs = [a != b for a, b in zip(draft, whole, strict=True)]
    assert list(itertools.compress(range(6), differs)) == [2, 3]
