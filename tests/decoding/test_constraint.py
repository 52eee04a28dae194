"""Constrained decoding of a random model, which by itself writes neither JSON nor what a regex asks."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from scipy import stats
from tiny_decoders import model_of, tiny_decoder

from layerskip import LayerSkipModel
from layerskip.decoding import DecodingConfig
from layerskip.decoding import constraint as constraint_module
from layerskip.decoding.batch import Batch
from layerskip.decoding.constraint import Constraint
from layerskip.decoding.generate import Row

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["rain", "snow"]},
        "town": {"type": "string", "maxLength": 4},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "warm": {"type": ["boolean", "null"]},
    },
    "required": ["kind", "town", "days", "warm"],
    "additionalProperties": False,
}
PLAIN = {"mode": "plain"}
FIXED = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 4}
CONFIGS = (
    PLAIN,
    {"mode": "early-exit", "exit_layer": 2},
    FIXED,
    FIXED | {"draft_from": "grammar+both", "draft_vocabulary": 120},
    {"mode": "auto"},
    {"mode": "auto", "exit_layer": 1, "draft_vocabulary": 120},
)


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32")


def constraint_of(model, **grammar):
    return model.constraint(DecodingConfig(**grammar))


def tokens_of(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


# --- answers ------------------------------------------------------------------------------------


def test_answers_follow_the_schema_in_every_mode(model):
    texts = set()
    for options in CONFIGS:
        for temperature in (0.0, 2.0):
            answer = model.generate(
                "Weather:", json_schema=SCHEMA, temperature=temperature, seed=1, **options
            )
            value = json.loads(answer.text)
            assert list(value) == SCHEMA["required"]
            assert value["kind"] in ("rain", "snow")
            assert len(value["town"]) <= 4
            assert 0 <= value["days"] <= 99
            assert value["warm"] in (True, False, None)
            assert answer.finish_reason == "stop"
            texts.add(answer.text)
    assert len(texts) > 2


def test_answers_match_the_regular_expression(model):
    regex = r"(ab|c[0-9]{1,3}) is (one|two)+\."
    for seed, options in enumerate(CONFIGS):
        answer = model.generate("x", regex=regex, temperature=1.5, seed=seed, **options)
        assert re.fullmatch(regex, answer.text)
        assert answer.finish_reason == "stop"


def test_greedy_answer_does_not_depend_on_drafts(model):
    plain = model.generate("Weather:", json_schema=SCHEMA, mode="plain")
    for options in CONFIGS[2:]:
        answer = model.generate("Weather:", json_schema=SCHEMA, **options)
        assert answer.token_ids == plain.token_ids


def test_rows_with_and_without_a_grammar_run_side_by_side(model):
    grammars = ({"json_schema": SCHEMA}, {}, {"regex": "[a-c]{9}"}, {})
    configs = [
        model.resolve(max_new_tokens=60, exit_layer=2, draft_tokens=4, **grammar)
        for grammar in grammars
    ]
    batch, answers = Batch(model.decoder), {}
    for config in configs:
        ends = model.eos_token_ids(config)
        mask = model.constraint(config)
        row = Row(model.decoder, [5, 6, 7], config, eos_token_ids=ends, logits_mask=mask)
        answers[row] = []
        batch.add(row)
    for output in batch:
        assert output.error is None
        answers[output.row] += output.step.tokens
    alone = [model.generate([5, 6, 7], config).token_ids for config in configs]
    assert list(answers.values()) == alone


def test_prompts_of_a_list_each_have_their_own_place_in_the_grammar(model):
    answers = model.generate(["a", "some longer prompt"], regex="[a-z]{3}, [0-9]{4}", seed=3)
    assert all(re.fullmatch("[a-z]{3}, [0-9]{4}", answer.text) for answer in answers)


@pytest.mark.parametrize("draft_from", ["early-exit", "grammar+both"])
def test_sampled_answers_with_drafts_are_distributed_as_without(model, draft_from):
    """A chi-square test against the probability of every answer, by masked plain passes."""
    regex, prompt, temperature = "(a|b|xyz)(c|xyz)", [9, 20, 31], 3.0
    expected = {}
    for text in ("ac", "axyz", "bc", "bxyz", "xyzc", "xyzxyz"):
        tokens, constraint = tokens_of(model, text), constraint_of(model, regex=regex)
        decoder = model.decoder
        ids = torch.tensor([[*prompt, *tokens]])
        hidden = decoder.run(decoder.embed(ids), 0, len(decoder.layers), decoder.new_cache(20))
        logits = decoder.logits(hidden)[0, len(prompt) - 1 :].double() / temperature
        probability = 1.0
        for i, token in enumerate(tokens):
            mask = constraint(tokens[:i])
            probability *= float(logits[i].masked_fill(~mask, float("-inf")).softmax(-1)[token])
        expected[text] = probability
    assert sum(expected.values()) == pytest.approx(1.0)
    counts, n = dict.fromkeys(expected, 0), 300
    config = model.resolve(
        **FIXED | {"draft_from": draft_from, "draft_vocabulary": 80},
        regex=regex,
        temperature=temperature,
    )
    for seed in range(n):
        counts[model.generate(prompt, config, seed=seed).text] += 1
    frequencies = [n * probability / sum(expected.values()) for probability in expected.values()]
    assert stats.chisquare(list(counts.values()), frequencies).pvalue > 1e-3


# --- tokens that have to follow -----------------------------------------------------------------


def test_forced_tokens_are_drafted_by_the_grammar_and_accepted(model):
    answer = model.generate("x", regex="(yes|no), that is right")
    assert {*answer.steps[1].sources} == {"grammar"}
    assert answer.rounds == 1
    assert answer.drafted == answer.accepted == answer.new_tokens - 1
    answer = model.generate("x", regex="(yes|no), that is right", **FIXED)
    assert {source for step in answer.steps for source in step.sources} == {"early-exit"}


def test_forced_tokens_reach_to_the_next_choice_and_to_the_end(model):
    def after(text):
        forced = constraint.forced_tokens(tokens_of(model, text))
        return model.tokenizer.decode(forced)

    constraint = constraint_of(model, regex="(yes|no), (this|that) is all")
    assert after("y") == "es, th"
    assert after("yes, tha") == "t is all</s>"
    assert after("n") == "o, th"
    assert after("yes, that is all") == "</s>"
    assert after("maybe") == ""


# --- masks --------------------------------------------------------------------------------------


def test_masks_after_rejected_drafts_are_those_of_a_new_constraint(model):
    constraint = constraint_of(model, json_schema=SCHEMA)
    answer = tokens_of(model, '{"kind": "snow", "town": "abc", "days": 12, "warm": null}')
    for n in range(len(answer) + 1):
        constraint.forced_tokens(answer[:n])
        for draft in ([], answer[n : n + 3], tokens_of(model, '"}x')):
            for i in range(len(draft) + 1):
                mask = constraint([*answer[:n], *draft[:i]])
                expected = constraint_of(model, json_schema=SCHEMA)([*answer[:n], *draft[:i]])
                assert (mask is None) == (expected is None)
                assert mask is None or torch.equal(mask, expected)


def test_end_token_is_allowed_only_where_the_grammar_may_end(model):
    constraint = constraint_of(model, regex="ab(cd)*")
    (end,) = model.end_tokens
    tokens = tokens_of(model, "abcdcd")
    ends = [bool(constraint(tokens[:n])[end]) for n in range(len(tokens) + 1)]
    assert ends == [False, False, True, False, True, False, True]
    assert constraint(tokens_of(model, "ax")) is None
    constraint([*tokens, end])  # a draft may go on
    assert constraint(tokens[:1]).nonzero().tolist() == [tokens_of(model, "b")]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regular expression cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json_schema": {"type": "text"}}, "JSON schema cannot be used: Invalid type: text"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "http://localhost/schema"}}, "cannot be used"),
        ({"json_schema": {"$ref": "#"}}, "no text is allowed"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"json_schema": "{"}, "the JSON schema is not JSON"),
        ({"json_schema": {"const": float("nan")}}, "the JSON schema is not JSON"),
        ({"json_schema": "[]"}, "has to be an object"),
        ({"json_schema": {}, "regex": "a"}, "not both"),
        ({"regex": "a" * 70_000}, "the limit is 65536"),
        ({"regex": 5}, "has to be a text"),
        ({"regex": "a", "ignore_eos": True}, "leave ignore_eos out"),
        ({"draft_from": "grammar"}, "there is no grammar to draft from"),
    ],
    ids=str,
)
def test_bad_grammar_is_one_line(model, options, message):
    with pytest.raises(ValueError, match=message) as error:
        model.generate("x", **options)
    assert "\n" not in str(error.value)


def test_work_on_a_grammar_is_bounded(model, monkeypatch):
    regex = "(a|b)*c{3}(a|d)*"
    monkeypatch.setitem(constraint_module.LIMITS, "max_lexer_states", 2)
    with pytest.raises(ValueError, match="cannot be used: lexer error: too many states"):
        model.generate("x", regex=regex)
    monkeypatch.setitem(constraint_module.LIMITS, "initial_lexer_fuel", 10)
    with pytest.raises(ValueError, match=r"cannot be used: .*too big"):
        model.generate("x", regex=regex)


def test_missing_parts_are_named(model, monkeypatch):
    decoder = tiny_decoder("llama2")
    with pytest.raises(ValueError, match="no tokenizer"):
        model_of(decoder, end_tokens=(2,)).generate([1], regex="a")
    with pytest.raises(ValueError, match="needs a `Constraint`"):
        Row(decoder, [1], DecodingConfig(mode="plain", regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    fresh = model.with_settings(dataclasses.replace(model.settings, end_tokens=(1,)))
    with pytest.raises(ValueError, match=r"pip install 'layerskip\[serve\]'"):
        fresh.generate("x", regex="a")


def test_tokens_of_a_larger_vocabulary_are_never_allowed(model):
    """A model may have more rows than its tokenizer has tokens."""
    from llguidance.hf import from_tokenizer

    size = len(model.tokenizer) + 5
    constraint = Constraint(from_tokenizer(model.tokenizer, size, [2]), regex="[a-z]+")
    assert constraint([]).sum() == 26
    assert len(constraint([])) == size
