"""Drafts from the text itself."""

import copy
import dataclasses
import gc
import random
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.draft_length import DraftLength, NgramLength, by_match
from layerskip.decoding.draft_text import MAX_MATCH, MIN_MATCH, Datastore
from layerskip.decoding.ngram import NgramDrafter, NgramIndex
from layerskip.decoding.pace import Pace
from scipy import stats
from tiny_decoders import (
    ALL_DRAFTS,
    GREEDY,
    LAYERS,
    PLAIN,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
)

from layerskip.decoding import Sampling, Step
from layerskip.decoding import ngram as ngrams
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.model import StepCosts

SAMPLES = 1500


def ngram(draft_tokens, draft_from="n-gram", exit_layer=None):
    return speculative(exit_layer, draft_tokens, draft_from=draft_from)


def reference(tokens, limit):
    """The longest suffix seen before, its latest earlier place, and what followed, with its period."""
    for n in range(min(MAX_MATCH, len(tokens)), MIN_MATCH - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                after = tokens[start + n :]
                return n, [after[i % len(after)] for i in range(limit)]
    return 0, []


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 12))
def test_it_proposes_what_followed_the_longest_latest_match(tokens, limit):
    assert NgramIndex(tokens).propose(limit) == reference(tokens, limit)


@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), max_size=6),
    st.integers(0, 12),
)
def test_drafted_tokens_are_matched_and_continued_but_not_searched(tokens, drafted, limit):
    text = [*tokens, *drafted]
    expected = 0, []
    for n in range(MIN_MATCH, min(MAX_MATCH, len(text)) + 1):
        for start in range(len(tokens) - n):  # the longest match counts, of these the latest
            if text[start : start + n] == text[-n:]:
                after = text[start + n :]
                expected = n, [after[i % len(after)] for i in range(limit)]
    assert NgramIndex(tokens).propose(limit, drafted) == expected


def test_the_places_that_are_compared_are_the_newest():
    found = [1, 2, 3, 4, 5]
    for others, expected in ((ngrams._PLACES - 1, (5, [6])), (ngrams._PLACES, (2, [7]))):
        text = [*found, 6, *[9, 4, 5, 7] * others, *found]
        assert NgramIndex(text).propose(1) == expected


def test_nothing_is_proposed_beyond_an_end_token():
    decoder = tiny_decoder("llama2")
    drafter = NgramDrafter(decoder, GREEDY, [5, 6, 7, 8, 9, 5, 6], end_tokens={8})
    draft = drafter.draft(torch.tensor([[6]]), 4, decoder.new_cache(16), None, None)
    assert draft.tokens.tolist() == [[7, 8]]


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(0, 20))
def test_growing_is_starting_with_all(tokens, cut):
    grown = NgramIndex(tokens[:cut])
    grown.extend(tokens[cut:])
    assert grown.propose(9) == NgramIndex(tokens).propose(9)


def test_the_draft_text_is_searched_where_it_promises_more():
    decoder = tiny_decoder("llama2")
    prompt, text = [1, 2, 3, 5, 6, 4, 1, 2], Datastore.from_tokens([1, 2, 7, 7, 8] * 9)

    def drafted(prompt, text, **options):
        length = NgramLength(DraftCosts(layers=0.0, head=0.0, passes=(1.0, 1.01)), Pace())
        drafter = NgramDrafter(decoder, GREEDY, prompt, length=length, text=text, **options)
        draft = drafter.draft(torch.tensor([prompt[-1:]]), 3, decoder.new_cache(16), None, None)
        drafter.settle([0], 0)
        return draft.tokens.tolist()[0]

    assert drafted(prompt, None) == [3, 5, 6]
    assert drafted(prompt, text) == [7, 7, 8]
    assert drafted(prompt, text, end_tokens={7}) == [7]
    assert drafted([*prompt, 3, 5, 6, 4, 1, 2, 3, 5, 6, 4], text) == [1, 2, 3]  # a match of five


def test_what_was_proposed_is_judged_where_nothing_was_drafted():
    decoder = tiny_decoder("llama2")
    length = NgramLength(DraftCosts(layers=0.0, head=0.0, passes=(1.0, 9.0)), Pace())
    drafter = NgramDrafter(decoder, GREEDY, [1, 2, 3, 4, 1, 2], length=length)
    assert length.expected(by_match(2, 1)) == pytest.approx(0.3)
    assert drafter.draft(torch.tensor([[2]]), 3, decoder.new_cache(16), None, None) is None
    drafter.settle([3], 0)
    assert length.expected(by_match(2, 1)) == pytest.approx(1.6 / 3)


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, 9])
@pytest.mark.parametrize("draft_text", [None, tuple(range(20)) * 2])
@pytest.mark.parametrize(
    ("draft_from", "exit_layer"), [("n-gram", None), ("both", 1), ("both", LAYERS)]
)
def test_greedy_is_plain(draft_tokens, draft_text, draft_from, exit_layer):
    decoder = tiny_decoder("llama3.1")
    for seed in range(3):
        prompt = random_prompt(decoder, 6, seed) * 3
        plan = ngram(draft_tokens, draft_from, exit_layer)
        plan = dataclasses.replace(plan, draft_text=draft_text)
        assert ids(decoder, prompt, plan, n=40) == ids(decoder, prompt, PLAIN, n=40)


def test_a_repeating_answer_is_drafted_and_sources_are_named():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 4) * 4
    sources = set()
    accepted = 0
    for step in steps(decoder, prompt, ngram(4, "both", 1), n=60):
        sources.add(step.source)
        accepted += step.accepted if step.source == "n-gram" else 0
    assert {"n-gram", "early-exit"} <= sources
    assert accepted > 0


def following(exit_layer):
    """Everything but a pass is all but free, so that even a tiny model's vague drafts are kept."""
    free = StepCosts(
        dtype="float32",
        weights="16bit",
        device="cpu",
        kernels="pytorch",
        exit_layer=exit_layer,
        draft_step=1e-3,
        draft_tokens_scored=1,
        head=1e-3,
        passes=(1.0, 1.0),
        overhead=0.0,
    )
    return speculative(
        exit_layer,
        draft_tokens=9,
        draft_from="both",
        adaptive=True,
        costs=free,
    )


def followed(made):
    """The steps in whose draft n-grams stand behind what an early exit drafted."""
    return [step for step in made if step.source == "early-exit" and step.drafted > step.from_exit]


@pytest.mark.parametrize(("exit_layer", "upper"), [(1, 0.02), (LAYERS - 1, 0.02), (1, 0.3)])
def test_ngrams_follow_a_draft_and_the_answer_stays(exit_layer, upper, monkeypatch):
    monkeypatch.setattr(DraftLength, "_drafting_on", lambda *_: 0.0)
    decoder = tiny_decoder("llama3.1", upper=upper)
    found = []
    for seed in range(3):
        prompt = random_prompt(decoder, 8, seed) * 3
        made = steps(decoder, prompt, following(exit_layer), n=60)
        assert [t for step in made for t in step.tokens] == ids(decoder, prompt, PLAIN, n=60)
        for step in made:
            assert 0 <= step.from_exit <= step.drafted
            assert not (step.from_exit and step.source == "n-gram")
        found += followed(made)
    assert found


@pytest.fixture
def behind_texts(monkeypatch):
    """A text stands between an exit's tokens where chance puts it; after how many the exit went on."""
    chance, begun = random.Random(0), list[int]()
    plain = EarlyExitDrafter._chosen

    def some(length, chances):
        n = min(chance.randrange(4), len(chances), length._most - length.drafted)
        length._confidences += [None] * n
        length._between += n
        return n

    def counted(drafter, *args):
        begun.append(drafter.length.drafted)
        return plain(drafter, *args)

    monkeypatch.setattr(DraftLength, "proven", True)
    monkeypatch.setattr(DraftLength, "instead", some)
    monkeypatch.setattr(EarlyExitDrafter, "_chosen", counted)
    return begun


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize(("exit_layer", "upper"), [(1, 0.02), (LAYERS - 1, 0.02), (1, 0.3)])
def test_a_text_stands_between_an_exits_tokens_and_the_answer_stays(
    exit_layer, upper, is_right, behind_texts
):
    """However many tokens it has at a place, and whether they are right."""
    decoder = tiny_decoder("llama3.1", upper=upper)
    between = 0
    for seed in range(3):
        prompt = random_prompt(decoder, 8, seed) * 2
        answer = ids(decoder, prompt, PLAIN, n=40)
        text = tuple(answer if is_right else [*answer[::2]] * 3)
        plan = dataclasses.replace(following(exit_layer), draft_text=text)
        made = steps(decoder, prompt, plan, n=40)
        assert [t for step in made for t in step.tokens] == answer
        assert all(0 <= step.from_exit <= step.drafted for step in made)
        between += sum(step.drafted > step.from_exit > 0 for step in made)
    assert between
    assert max(behind_texts) > 1  # an exit went on behind a text


def test_an_exit_that_goes_on_behind_a_text_is_penalized_for_its_tokens(behind_texts):
    """Else an exit that is the whole model would be wrong behind some."""
    decoder, penalized = tiny_decoder("llama3.1", upper=0.0), Sampling(repetition_penalty=1.5)
    for seed in range(6):
        prompt = random_prompt(decoder, 4, seed)
        answer = ids(decoder, prompt, PLAIN, n=40, sampling=penalized)
        plan = dataclasses.replace(following(1), draft_text=tuple(answer))
        made = steps(decoder, prompt, plan, n=40, sampling=penalized)
        assert [t for step in made for t in step.tokens] == answer
        assert any(step.drafted > step.from_exit > 0 for step in made)
        assert all(step.accepted == step.drafted for step in made)
    assert max(behind_texts) > 1


def test_a_cut_step_has_what_is_left_of_the_tokens_that_followed():
    step = Step((1, 2, 3, 4, 5), drafted=5, accepted=4, source="early-exit", from_exit=2)
    cuts = [step.first(n) for n in (1, 2, 3, 4, 5)]
    assert [cut.drafted for cut in cuts] == [1, 2, 3, 4, 5]
    assert [cut.from_exit for cut in cuts] == [2] * 5  # whose time was spent all the same


def test_without_a_match_nothing_is_drafted():
    decoder = tiny_decoder("llama3.1")
    _first, second, *_ = steps(decoder, [1, 2, 3], ngram(4), n=3)
    assert (second.drafted, second.source) == (0, "model")


def answers(decoder, prompt, plan, sampling, n):
    """How often each answer of n tokens is sampled."""
    return Counter(
        tuple(ids(decoder, prompt, plan, n=n, sampling=sampling, seed=seed))
        for seed in range(SAMPLES)
    )


def assert_same_distribution(one, other):
    """A chi-square test, which sound samplers fail once in a thousand seeds; the seeds are fixed."""
    common = [answer for answer in {*one, *other} if one[answer] + other[answer] >= 20]
    assert len(common) > 3
    counts = [(one[answer], other[answer]) for answer in common]
    rest = [SAMPLES - sum(column) for column in zip(*counts, strict=True)]
    if any(rest):
        counts.append(tuple(rest))
    assert stats.chi2_contingency([*zip(*counts, strict=True)]).pvalue > 1e-3


def test_sampled_tokens_that_follow_a_draft_have_the_models_distribution(monkeypatch):
    """Whatever follows is accepted with the model's probability, and so is the draft before it."""
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 3) * 3
    sampling = Sampling(temperature=0.7, top_k=2)
    monkeypatch.setattr(NgramLength, "choose", lambda *_, **__: 0)
    monkeypatch.setattr(DraftLength, "follow", lambda self, chances: len(chances))
    monkeypatch.setattr(DraftLength, "proven", True)
    likely = ids(decoder, prompt, PLAIN, n=3)[2]
    monkeypatch.setattr(NgramIndex, "propose", lambda self, n, drafted=(): (5, [likely] * n))
    made = steps(decoder, prompt, following(1), n=4, sampling=sampling, seed=0)
    assert followed(made)
    plain = answers(decoder, prompt, PLAIN, sampling, 4)
    assert_same_distribution(plain, answers(decoder, prompt, following(1), sampling, 4))


def test_an_answer_leaves_nothing_for_the_garbage_collector():
    """A cycle would keep the decoder and an index of the prompt until it happens to come by."""
    gc.collect()
    gc.disable()
    try:
        decoder = copy.copy(tiny_decoder("llama3.1"))
        prompt = random_prompt(decoder, 20)
        assert steps(decoder, prompt, ALL_DRAFTS, 12)
        left = weakref.ref(decoder)
        del decoder
        assert left() is None
    finally:
        gc.enable()
