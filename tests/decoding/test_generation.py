"""The numbers of an answer against counts made by hand."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerskip.decoding.generation import accepted_by_position
from scripted import END, encode, scripted_model

from layerskip.decoding import Generation, Step, answer

ANSWER = encode("abcdefghijkl")


def test_a_known_pattern_of_misses():
    """Twelve tokens, drafts of four, the draft wrong about tokens 3 and 4 (counted from 0).

    prompt   token 0
    round 1  drafts 1-4, 3 is wrong: 2 accepted, own 3
    round 2  drafts 4-7, 4 is wrong: 0 accepted, own 4
    round 3  drafts 5-8:             4 accepted, own 9
    round 4  drafts 10, no room for more: 1 accepted, own 11
    """
    model = scripted_model(ANSWER, misses={3, 4})
    made = model.generate(
        [0], mode="self-speculative", exit_layer=2, draft_tokens=4, max_new_tokens=12
    )
    assert made.token_ids == ANSWER
    counts = [(len(step.tokens), step.drafted, step.accepted, step.source) for step in made.steps]
    assert counts == [
        (1, 0, 0, "model"),
        (3, 4, 2, "early-exit"),
        (1, 4, 0, "early-exit"),
        (5, 4, 4, "early-exit"),
        (2, 1, 1, "early-exit"),
    ]
    assert (made.rounds, made.drafted, made.accepted) == (4, 13, 7)
    assert made.acceptance_rate == 7 / 13
    assert made.mean_accepted_length == 11 / 4
    assert made.accepted_by_position == [3 / 4, 2 / 3, 1 / 3, 1 / 3]


def test_an_end_inside_an_accepted_draft_counts_what_was_kept():
    """Tokens 1-4 are drafted and right, but 2 is the end: two of two count, no own token follows."""
    model = scripted_model([*encode("ab"), END, *encode("cdefgh")])
    made = model.generate([0], mode="self-speculative", exit_layer=2, draft_tokens=4)
    assert made.steps[-1] == Step(tuple(made.token_ids[1:]), 2, 2, "early-exit", from_exit=4)
    assert (made.rounds, made.accepted, made.mean_accepted_length) == (1, 2, 2.0)
    assert (made.acceptance_rate, made.accepted_by_position) == (1.0, [1.0, 1.0])
    model = scripted_model(encode("abSTOPcd"))
    made = model.generate([0], mode="self-speculative", exit_layer=2, draft_tokens=7, stop="STOP")
    assert made.steps[-1] == Step(tuple(encode("bSTOP")), 5, 5, "early-exit", from_exit=7)


def test_an_end_that_is_the_models_own_leaves_the_round_whole():
    """Tokens 1-4 are drafted, 2 is wrong: the model's own token there is the end, the draft missed."""
    model = scripted_model([*encode("ab"), END, *encode("cdefgh")], misses={2})
    made = model.generate([0], mode="self-speculative", exit_layer=2, draft_tokens=4)
    wrong = (END + 1, *encode("cd"))
    own = tuple(made.token_ids[1:])
    assert made.steps[-1] == Step(own, 4, 1, "early-exit", wrong, from_exit=4)
    assert made.acceptance_rate == 1 / 4


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_step_cut_short(n):
    """Three tokens, two of six drafted ones among them; the cut at the third token is none."""
    early = {"source": "early-exit", "from_exit": 6}
    step = Step((7, 8, 9), drafted=6, accepted=2, rejected=(1, 2, 3, 4), **early)
    short = Step((7, 8)[:n], drafted=n, accepted=n, **early)
    assert step.first(n) == (step if n >= 3 else short)
    assert step.first(2).first(1) == step.first(1)
    assert dataclasses.replace(step, source="n-gram", from_exit=0).first(n).from_exit == 0


@pytest.mark.parametrize("mode", [{"mode": "plain"}, {"mode": "early-exit", "exit_layer": 2}])
def test_without_drafts(mode):
    made = scripted_model(ANSWER, misses={3}).generate([0], max_new_tokens=5, **mode)
    assert (made.rounds, made.drafted, made.accepted) == (0, 0, 0)
    assert (made.acceptance_rate, made.mean_accepted_length) == (None, None)
    assert made.accepted_by_position == []
    assert made.draft_tokens is None


def test_drafts_of_no_tokens_are_rounds_all_the_same():
    made = scripted_model(ANSWER).generate([0], exit_layer=2, draft_tokens=0, max_new_tokens=5)
    assert (made.rounds, made.drafted, made.mean_accepted_length) == (4, 0, 1.0)
    assert made.acceptance_rate is None


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the clock is one second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(answer, "device_clock", lambda device: lambda: next(seconds))


@pytest.mark.usefixtures("ticking")
def test_times():
    """The clock is read at the start and once a step; speed counts the tokens after the first."""
    made = scripted_model(ANSWER).generate([0], mode="plain", max_new_tokens=6)
    assert (made.ttft_s, made.decode_s, made.tokens_per_s) == (1, 5, 5 / 5)
    made = scripted_model(ANSWER).generate(
        [0], mode="self-speculative", exit_layer=2, draft_tokens=4, max_new_tokens=12
    )
    assert [len(step.tokens) for step in made.steps] == [1, 5, 5, 1]
    assert (made.ttft_s, made.decode_s, made.tokens_per_s) == (1, 3, 11 / 3)
    made = scripted_model(ANSWER).generate([0], max_new_tokens=1)
    assert (made.ttft_s, made.decode_s, made.tokens_per_s) == (1, 0, None)


def test_time_in_a_pause_is_not_counted(monkeypatch):
    now = 0.0
    monkeypatch.setattr(answer, "device_clock", lambda device: lambda: now)
    shown = scripted_model(ANSWER).answer([0], mode="plain", max_new_tokens=6)
    for _ in shown:
        with shown.paused():
            now += 100
        now += 1
    assert (shown.generation.ttft_s, shown.generation.decode_s) == (0, 5)


def test_to_dict_has_the_documented_fields_in_order():
    made = scripted_model(ANSWER, prompt_tokens=2).generate(
        encode("xy"), exit_layer=2, draft_tokens=3, max_new_tokens=5
    )
    fields = made.to_dict()
    assert list(fields) == [
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "new_tokens",
        "mode",
        "exit_layer",
        "draft_tokens",
        "rounds",
        "drafted",
        "accepted",
        "acceptance_rate",
        "mean_accepted_length",
        "accepted_by_position",
        "ttft_s",
        "decode_s",
        "tokens_per_s",
    ]
    assert fields["text"] == "abcde"
    assert (fields["prompt_tokens"], fields["new_tokens"]) == (2, 5)
    assert (fields["mode"], fields["exit_layer"], fields["draft_tokens"]) == (
        "self-speculative",
        2,
        3,
    )


# Rounds as (drafted, accepted).
rounds = st.lists(st.integers(0, 6).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))))


@given(rounds=rounds)
def test_statistics_agree_with_each_other(rounds):
    steps = [Step((0,)), *(Step((0,) * (a + 1), d, a, "early-exit") for d, a in rounds)]
    made = Generation(
        text="",
        token_ids=[token for step in steps for token in step.tokens],
        finish_reason="length",
        prompt_tokens=1,
        mode="self-speculative",
        exit_layer=1,
        draft_tokens=6,
        ttft_s=0.0,
        decode_s=1.0,
        steps=tuple(steps),
    )
    assert made.rounds == len(rounds)
    assert made.new_tokens == 1 + made.accepted + made.rounds
    if rounds:
        assert made.mean_accepted_length == (made.accepted + made.rounds) / made.rounds
    by_position = accepted_by_position(steps)
    reached = [sum(d > i for d, _ in rounds) for i in range(len(by_position))]
    assert sum(r * n for r, n in zip(by_position, reached, strict=True)) == pytest.approx(
        made.accepted
    )
