"""Order of answers, failures and interruption."""

import itertools
from collections import Counter

import pytest

from layerskip.bench.measure import (
    SWITCH_S,
    WARM_UP_TOKENS,
    Run,
    Setting,
    SystemFailedError,
    measure,
)
from layerskip.decoding import Step

A, B, C = (Setting(mode=name) for name in "abc")


class Diary:
    """A system that writes down what it is asked, into a list that several share."""

    def __init__(self, settings, asked, name="system", fails=lambda setting, prompt, n: False):
        self.name, self.settings, self.asked, self.fails = name, settings, asked, fails

    def answer(self, setting, prompt, max_new_tokens):
        self.asked.append((setting.mode, prompt, max_new_tokens))
        if self.fails(setting, prompt, max_new_tokens):
            raise SystemFailedError("no more paper")
        return Run(steps=(Step((len(self.asked),)),), text="", ttft_s=1.0, decode_s=0.0)


def test_all_take_turns_and_another_one_begins_each_time():
    asked = []
    prompts = [[1], [2]]
    entries = measure([Diary([A, B, C], asked)], prompts, max_new_tokens=40, repeats=2)
    warm_up, rest = asked[:3], asked[3:]
    assert warm_up == [(name, [1], WARM_UP_TOKENS) for name in "abc"]
    assert rest == [
        *((name, [1], 40) for name in "abc"),
        *((name, [2], 40) for name in "bca"),
        *((name, [1], 40) for name in "bca"),
        *((name, [2], 40) for name in "cab"),
    ]
    # What was answered lies by prompt and repetition, whatever the order was; a's answers are:
    numbers = [[run.token_ids[0] for run in of_prompt] for of_prompt in entries[0].runs]
    assert numbers == [[4, 12], [9, 14]]
    assert len(asked) == len(entries) * (1 + 2 * 2)


def test_everybody_follows_everybody_else_equally_often():
    for n in (1, 4, 5):
        asked = []
        settings = [Setting(mode=str(i)) for i in range(n)]
        measure([Diary(settings, asked)], [[1]] * 2 * n, max_new_tokens=1)
        turns = [[mode for mode, _, _ in asked[i : i + n]] for i in range(n, len(asked), n)]
        assert all(sorted(turn) == sorted(s.mode for s in settings) for turn in turns)
        assert Counter(turn[0] for turn in turns) == {s.mode: 2 for s in settings}
        pairs = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
        assert len(pairs) == n * (n - 1)
        assert set(pairs.values()) <= {2}


def test_systems_take_turns_with_each_other():
    asked = []
    measure(
        [Diary([A, B], asked), Diary([C], asked, name="other")],
        [[1], [2], [3]],
        max_new_tokens=5,
    )
    order = "".join(name for name, _, _ in asked)
    assert order == "abc" + "abc" + "bca" + "cab"
    answered = asked[len("abc") :]  # after the warm-up
    assert [prompt for _, prompt, _ in answered] == [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    assert {n for _, _, n in asked} == {5}  # no warm-up is longer than an answer


def test_threads_of_a_system_come_to_rest_before_another_one_answers(monkeypatch):
    slept, asked = [], []
    monkeypatch.setattr("layerskip.bench.measure.time.sleep", slept.append)
    monkeypatch.setattr("layerskip.bench.measure.SWITCH_S", SWITCH_S)
    measure([Diary([A, B], [])], [[1], [2], [3]], max_new_tokens=1)
    assert slept == []
    two = [Diary([A], asked), Diary([B], asked, name="other")]
    measure(two, [[1], [2], [3]], max_new_tokens=1)
    answers = [name for name, _, _ in asked[2:]]  # after the warm-up
    assert slept == [SWITCH_S] * sum(a != b for a, b in itertools.pairwise(answers))
    assert slept


def test_callbacks():
    done, between = [], []
    measure(
        [Diary([A, B], [])],
        [[1], [2]],
        max_new_tokens=1,
        repeats=3,
        progress=lambda *so_far: done.append(so_far),
        between=lambda: between.append(len(done)),
    )
    total = 2 + 2 * 2 * 3
    assert done == [(number, total) for number in range(1, total + 1)]
    assert between == [2, 6, 10, 14]  # before each repetition and after the last


@pytest.mark.parametrize("when", ["warm-up", "later"])
def test_who_fails_is_left_out_and_the_others_go_on(when):
    def fails(setting, prompt, n):
        return setting is B and (prompt == [2] if when == "later" else n == WARM_UP_TOKENS)

    asked = []
    prompts = [[1], [2], [3]]
    entries = measure([Diary([A, B, C], asked, fails=fails)], prompts, max_new_tokens=40)
    assert [entry.error for entry in entries] == [None, "no more paper", None]
    assert [len(entry.runs) for entry in entries] == [3, 0, 3]
    assert [mode for mode, _, _ in asked].count("b") == (1 if when == "warm-up" else 3)


def test_tokens_after_the_first_step_are_decoded():
    """A first step may hold several tokens, where a peer drafts before it tells anything."""
    run = Run(steps=(Step((1, 2)), Step((3,)), Step((4, 5, 6))), text="", ttft_s=1, decode_s=2)
    assert (run.token_ids, run.decoded_tokens) == ([1, 2, 3, 4, 5, 6], 4)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, MemoryError])
def test_what_ends_it_leaves_the_prompts_that_all_have_answered(ending):
    """At the eighth call: a warm-up of each, two prompts of both, and half of the third."""
    asked, partial = [], []

    def ends(setting, prompt, n):
        if len(asked) == 8:
            raise ending
        return False

    def run():
        system = Diary([A, B], asked, fails=ends)
        measure([system], [[1], [2], [3]], max_new_tokens=2, partial=partial)

    with pytest.raises(ending):
        run()
    assert [len(entry.runs) for entry in partial] == [2, 2]
    partial.clear()
    asked[:] = [None] * 5  # before the first prompt is over there is nothing
    with pytest.raises(ending):
        run()
    assert partial == []
