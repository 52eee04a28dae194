"""The figures of a row against numbers worked out by hand."""

import types

import numpy as np
import pytest
from scripted import encode, scripted_model

from layerskip.bench.measure import Entry, Run, Setting, measure
from layerskip.bench.rows import (
    acceptance,
    bootstrap_interval,
    comparison,
    is_echo,
    is_loop,
    name_of,
    row,
    speed,
)
from layerskip.bench.systems import LayerSkipSystem
from layerskip.decoding import DecodingConfig, Step

PLAIN = Setting()
DRAFTING = Setting(
    config=DecodingConfig(
        mode="self-speculative", draft_from="early-exit", exit_layer=2, draft_tokens=4
    )
)


def run(tokens, seconds, *, ttft=0.5, first=0, **more):
    """An answer of one token and then so many more, one a step."""
    steps = (Step((first,)), *(Step((i,)) for i in range(tokens)))
    return Run(steps=steps, text="", ttft_s=ttft, decode_s=seconds, **more)


def entry(runs, setting=PLAIN, name="layerskip", error=None):
    return Entry(types.SimpleNamespace(name=name), setting, runs, error)


def test_speed_in_total_and_in_the_middle():
    """10, 20 and 30 tokens after the first, in 1, 4 and 1 seconds."""
    figures = speed([[run(10, 1, ttft=0.1)], [run(20, 4, ttft=0.9)], [run(30, 1, ttft=0.2)]])
    assert figures["tokens_per_s"] == pytest.approx(60 / 6)
    assert figures["ms_per_token"] == pytest.approx(100)
    # Milliseconds a token are 100, 200 and 33.3.
    assert figures["ms_per_token_median"] == pytest.approx(100)
    assert figures["tokens_per_s_median"] == pytest.approx(10)
    assert figures["ttft_s"] == 0.2
    assert figures["new_tokens"] == 63


def test_repetitions_count_by_their_median():
    figures = speed([[run(10, 1), run(10, 9), run(10, 2)], [run(10, 4), run(10, 4), run(10, 3)]])
    assert figures["tokens_per_s"] == pytest.approx(20 / (2 + 4))


def test_answers_of_one_token_have_no_speed():
    figures = speed([[run(0, 0)], [run(10, 2)]])
    assert figures["tokens_per_s"] == pytest.approx(5)
    assert figures["new_tokens"] == 12
    assert speed([[run(0, 0)]])["tokens_per_s"] is None
    found = comparison([[run(0, 0)], [run(6, 1)]], [[run(6, 2)], [run(6, 3)]])
    assert found["speedup"] == pytest.approx(3)  # the second prompt alone
    assert found["speedup_interval"] is None  # nothing to draw from
    assert comparison([[run(0, 0)]], [[run(6, 2)]])["speedup"] is None


def test_ratio_of_totals_and_mean_of_ratios():
    """Prompt 1: 10 tokens/s over 5; prompt 2: 10 over 10 and much longer."""
    ours, plain = [[run(10, 1)], [run(90, 9)]], [[run(10, 2)], [run(90, 9)]]
    found = comparison(ours, plain)
    assert found["speedup"] == pytest.approx((100 / 10) / (100 / 11))
    assert found["speedup_mean_of_prompts"] == pytest.approx((2 + 1) / 2)
    # With two prompts, a quarter of the draws is prompt 1 twice and a quarter prompt 2 twice.
    assert found["speedup_interval"] == pytest.approx([1, 2])
    assert found["speedup_mean_of_prompts_interval"] == pytest.approx([1, 2])


def test_prompts_count_with_as_many_tokens_as_plain_has():
    """0.5 s and 20 tokens in 2 s, against 0.5 s and 5 tokens in 1 s: 20 would be 4 s."""
    found = comparison([[run(5, 1)]], [[run(20, 2)]])
    assert found["speedup_with_prompt"] == pytest.approx((0.5 + 2) / (0.5 + 4))
    ended = comparison([[run(5, 1)], [run(0, 0)]], [[run(20, 2)], [run(20, 2)]])
    assert ended["speedup_with_prompt"] == found["speedup_with_prompt"]
    assert comparison([[run(0, 0)]], [[run(20, 2)]])["speedup_with_prompt"] is None


def test_tokens_of_a_first_step_are_counted_once():
    """Its first step gives 11 of 16 tokens: 0.65 s against 0.15 + 0.15."""
    plain = [[run(15, 0.6, ttft=0.05)]]
    steps = (Step(tuple(range(11))), *(Step((i,)) for i in range(5)))
    peer = [[Run(steps=steps, text="", ttft_s=0.15, decode_s=0.15)]]
    assert comparison(peer, plain)["speedup_with_prompt"] == pytest.approx(0.65 / 0.30)
    assert speed(peer)["tokens_per_s_with_prompt"] == pytest.approx(16 / 0.30)
    assert speed(peer)["tokens_per_s"] == pytest.approx(5 / 0.15)


def test_the_interval_is_paired_by_prompt():
    """Prompts differ a hundredfold, the ratio does not: an interval of no width."""
    ours = [[run(10, 10.0**i)] for i in range(4)]
    plain = [[run(10, 1.5 * 10.0**i)] for i in range(4)]
    assert comparison(ours, plain)["speedup_interval"] == pytest.approx([1.5, 1.5])


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(1).normal(size=(1, 400))
    low, high = bootstrap_interval(values, lambda drawn: drawn[0].mean(axis=-1))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert [low, high] == bootstrap_interval(values, lambda drawn: drawn[0].mean(axis=-1))


def test_an_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(2).normal(size=(1, 50))
    intervals = []
    for at_once in (10**9, 700, 1):
        monkeypatch.setattr("layerskip.bench.rows._BOOTSTRAP_CHUNK", at_once)
        intervals.append(bootstrap_interval(values, lambda drawn: drawn[0].mean(axis=-1)))
    assert intervals == [intervals[0]] * 3


@pytest.fixture(scope="module")
def scripted_entries():
    """Two prompts with the same answer of twelve tokens; drafts of four, wrong at tokens 3 and 4.

    round 1  drafts 1-4, 3 is wrong: 2 accepted
    round 2  drafts 4-7, 4 is wrong: 0 accepted
    round 3  drafts 5-8:             4 accepted
    round 4  drafts 10:              1 accepted
    """
    model = scripted_model(encode("abcdefghijkl"), misses={3, 4})
    model.decoder.weight_bytes, model.decoder.head = 0, types.SimpleNamespace(weight_bytes=0)
    early = Setting(config=DecodingConfig(mode="early-exit", exit_layer=2))
    system = LayerSkipSystem(model, [PLAIN, early, DRAFTING])
    return measure([system], [[0], [7]], max_new_tokens=12, repeats=2)


def test_a_known_pattern_of_misses(scripted_entries):
    plain, early, drafting = scripted_entries
    figures = row(drafting, plain=plain.runs, quality=lambda texts: {"match": float(len(texts))})
    assert list(figures)[:4] == ["system", "mode", "exit_layer", "draft_tokens"]
    assert list(figures.values())[:4] == ["layerskip", "self-speculative", 2, 4]
    # Twice the rounds above, one repetition.
    assert (figures["rounds"], figures["drafted"], figures["accepted"]) == (8, 26, 14)
    assert figures["acceptance_rate"] == 7 / 13
    assert figures["accepted_by_position"] == [3 / 4, 2 / 3, 1 / 3, 1 / 3]
    assert figures["accepted_by_source"] == {"early-exit": 14}
    assert figures["mean_accepted_length"] == 11 / 4
    assert figures["identical_to_plain"] == 1.0
    assert figures["new_tokens"] == 24
    assert figures["quality"] == {"match": 2.0}
    figures = row(early, plain=plain.runs)
    assert figures["identical_to_plain"] == 0.0
    assert (figures["acceptance_rate"], figures["rounds"], figures["quality"]) == (None, 0, {})
    figures = row(plain, plain=plain.runs)
    assert (figures["speedup"], figures["identical_to_plain"]) == (1.0, 1.0)


def test_identical_is_the_share_of_prompts():
    plain = [[run(3, 1)], [run(3, 1)], [run(3, 1)], [run(2, 1)]]
    ours = [[run(3, 1)], [run(3, 1, first=9)], [run(3, 1)], [run(3, 1)]]
    assert row(entry(ours), plain=plain)["identical_to_plain"] == 0.5


def test_drafts_that_are_not_told_have_rounds_but_no_rate():
    """Peers tell how many tokens a round gave, not how many they drafted."""
    answer = Run(steps=(Step((1,)), Step((2, 3, 4)), Step((5,))), text="", ttft_s=1.0, decode_s=1.0)
    counts = acceptance([[answer]], reports_drafts=False)
    assert (counts["rounds"], counts["mean_accepted_length"]) == (2, 2.0)
    assert (counts["acceptance_rate"], counts["accepted_by_position"]) == (None, [])
    assert (counts["drafted"], counts["accepted"]) == (None, None)


def test_a_row_without_a_plain_one_has_the_same_figures():
    figures = row(entry([[run(3, 1)]]), plain=None)
    assert list(figures) == list(row(entry([[run(3, 1)]]), plain=[[run(3, 1)]]))
    assert (figures["speedup"], figures["speedup_interval"]) == (None, None)


def test_another_system_is_compared_with_its_own_plain_decoding_and_with_ours():
    ours, theirs = [[run(10, 1)], [run(10, 1)]], [[run(10, 2)], [run(10, 2, first=9)]]
    figures = row(entry(theirs, name="peer"), plain=theirs, layerskip_plain=ours)
    assert figures["speedup"] == 1.0
    assert figures["vs_layerskip_plain"] == pytest.approx(0.5)
    assert figures["vs_layerskip_plain_interval"] == pytest.approx([0.5, 0.5])
    assert (figures["identical_to_plain"], figures["identical_to_layerskip_plain"]) == (1.0, 0.5)
    without = row(entry(theirs, name="peer"), plain=None, layerskip_plain=ours)
    assert without["speedup"] is None
    assert without["identical_to_plain"] is None


def test_a_failure_is_a_row_with_its_reason():
    figures = row(entry([], error="not installed", name="peer"), plain=None)
    assert figures["error"] == "not installed"
    assert (figures["system"], figures["mode"]) == ("peer", "plain")
    whole = row(entry([[run(10, 1)]]), plain=[[run(10, 1)]])
    assert figures.keys() - whole.keys() == {"error"}
    assert {"tokens_per_s", "speedup", "acceptance_rate", "quality"} <= figures.keys()
    assert not any(figures[name] for name in ("tokens_per_s", "speedup", "quality"))


def test_memory_and_share_of_bandwidth():
    runs = [
        [run(4, 2, weight_bytes_read=800, peak_memory_bytes=5)],
        [run(2, 2, weight_bytes_read=400, peak_memory_bytes=7)],
    ]
    figures = row(entry(runs), plain=None, read_bandwidth=600.0)
    assert figures["share_of_bandwidth"] == pytest.approx((1200 / 4) / 600)
    assert figures["peak_memory_bytes"] == 7
    figures = row(entry([*runs, [run(4, 2)]]), plain=None, read_bandwidth=600.0)
    assert figures["share_of_bandwidth"] is None  # one does not tell


def test_figures_by_category():
    plain = [[run(10, 2)], [run(10, 2)], [run(10, 2)]]
    ours = [[run(10, 1)], [run(10, 2)], [run(10, 1)]]
    figures = row(entry(ours), plain=plain, categories=["qa", "chat", "qa"])["categories"]
    assert list(figures) == ["qa", "chat"]
    assert (figures["qa"]["samples"], figures["qa"]["speedup"]) == (2, pytest.approx(2))
    assert figures["qa"]["speedup_interval"] == pytest.approx([2, 2])
    assert (figures["chat"]["samples"], figures["chat"]["speedup"]) == (1, pytest.approx(1))
    assert "categories" not in row(entry(ours), plain=plain, categories=[None, None, None])


def test_every_option_of_decoding_is_in_a_row():
    figures = row(entry([[run(3, 1)]], DRAFTING), plain=None)
    assert {"draft_from", "adaptive", "draft_vocabulary", "datastore"} <= figures.keys()
    assert "temperature" not in figures  # all rows share it
    ngrams = DecodingConfig(mode="self-speculative", draft_from="n-gram", draft_tokens=3)
    figures = row(entry([[run(3, 1)]], Setting(config=ngrams)), plain=None)
    assert (figures["mode"], name_of(figures)) == ("n-gram", "n-gram d=3")


CYCLE, OTHERS = [5, 6, 7], list(range(100, 200))


def test_answers_that_loop():
    assert is_loop(CYCLE * 9)
    assert not is_loop(OTHERS[:30])
    assert is_loop(OTHERS[:10] * 2)
    assert not is_loop(OTHERS[:7] + OTHERS[50:57] + OTHERS[:7])  # n-grams of 7 tokens
    assert not is_loop(OTHERS[:30] + CYCLE * 9)  # 27 of 57 tokens
    assert is_loop(OTHERS[:26] + CYCLE * 9)
    assert not is_loop([])


def test_answers_that_echo_their_prompt():
    prompt = OTHERS[:40]
    assert is_echo(prompt[3:20], prompt)
    assert is_echo([*prompt[:8], 1, *prompt[20:28]], prompt)
    assert not is_echo([*prompt[:8], 1, 2, 3, 4], prompt)  # two thirds
    assert not is_echo(prompt[:5], prompt)  # too short to be a copy
    assert not is_echo(prompt, [])


def test_the_speedup_without_answers_that_loop_or_echo():
    def answer(tokens, seconds):
        steps = tuple(Step((token,)) for token in tokens)
        return [Run(steps=steps, text="", ttft_s=0.1, decode_s=seconds)]

    looping, echoing, good = CYCLE * 5, OTHERS[:20], OTHERS[40:60]
    plain = [answer(tokens, 8.0) for tokens in (looping, echoing, good)]
    ours = [answer(looping, 1.0), answer(echoing, 2.0), answer(good, 4.0)]
    figures = row(entry(ours), plain=plain, prompts=[[1], OTHERS[:30], [3]])
    assert (figures["looping"], figures["echoing"]) == (1 / 3, 1 / 3)
    assert figures["speedup_without_loops"] == pytest.approx(2.0)
    assert figures["speedup"] > 2.5
    figures = row(entry(ours), plain=plain, prompts=[[1], [], [3]])  # where copying is the task
    assert figures["echoing"] == 0
    assert row(entry(ours[:1]), plain=plain[:1])["speedup_without_loops"] is None
