"""The rows of a benchmark, and the options that each of them decodes with."""

import types

import pytest
from scripted import LAYERS, encode, scripted_model

from layerskip.bench.machine import read_bandwidth, weight_bytes_read
from layerskip.bench.systems import BenchConfig, LayerSkipSystem, settings_of
from layerskip.decoding import DecodingConfig, Step
from layerskip.model import CheckpointSettings


def model(answer="abcdef", end_tokens=(), **settings):
    scripted = scripted_model(
        encode(answer), settings=CheckpointSettings(end_tokens=tuple(end_tokens), **settings)
    )
    scripted.decoder.weight_bytes = 44
    scripted.decoder.head = types.SimpleNamespace(weight_bytes=4)
    return scripted


def rows(settings, *names):
    names = names or ("mode", "exit_layer", "draft_tokens")
    found = []
    for setting in settings:
        row = {**setting.config.to_row(), "mode": setting.mode, "label": setting.label}
        found.append(tuple(row[name] for name in names))
    return found


def test_every_pair_is_a_row():
    assert rows(settings_of(model(), exit_layers=(1, 3), draft_tokens=(2, 4))) == [
        ("plain", None, None),
        ("early-exit", 1, None),
        ("early-exit", 3, None),
        ("self-speculative", 1, 2),
        ("self-speculative", 1, 4),
        ("self-speculative", 3, 2),
        ("self-speculative", 3, 4),
        ("auto", None, 12),
    ]


def test_open_options_are_the_checkpoints_or_the_default():
    assert rows(settings_of(model(exit_layer=3, draft_tokens=6))) == [
        ("plain", None, None),
        ("early-exit", 3, None),
        ("self-speculative", 3, 6),
        ("auto", 3, 12),
    ]
    assert rows(settings_of(model(), modes=("self-speculative",))) == [
        ("plain", None, None),
        ("self-speculative", LAYERS // 4, 5),
    ]


def test_watching_changes_no_answer():
    seen = []

    def watch(setting, answer):
        seen.append((setting.mode, [piece.token_id for piece in answer]))

    settings = settings_of(model(), modes=("plain", "auto"))
    shown = LayerSkipSystem(model(), settings, watch=watch)
    hidden = LayerSkipSystem(model(), settings)
    for setting in settings:
        run = shown.answer(setting, [0], 7)
        assert run.token_ids == hidden.answer(setting, [0], 7).token_ids
        assert seen.pop() == (setting.mode, run.token_ids)


def test_rows_of_other_drafts():
    settings = settings_of(
        model(),
        modes=("self-speculative",),
        exit_layers=(1, 2),
        draft_tokens=(3,),
        draft_from=("n-gram", "both"),
        draft_vocabulary=(50,),
        adaptive=True,
    )
    names = ("mode", "exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary")
    mode = "self-speculative"
    assert rows(settings[1:], *names) == [
        ("n-gram", None, 3, "n-gram", False, None),
        (mode, 1, 3, "both", False, None),
        (mode, 1, 3, "both", False, 51),  # with the end token
        (mode, 1, 12, "both", True, None),
        (mode, 2, 3, "both", False, None),
        (mode, 2, 3, "both", False, 51),
        (mode, 2, 12, "both", True, None),
    ]


def test_an_ablation_has_auto_without_each_part_and_each_part_alone():
    scripted = model(exit_layer=2, draft_vocabulary=(7, 5))
    settings = settings_of(scripted, modes=(), ablation=True)[1:]
    names = ("label", "exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary")
    assert rows(settings, *names) == [  # a draft vocabulary has the end token too
        ("without n-grams", 2, 12, "early-exit", True, 3),
        ("without early exit", None, 12, "n-gram", True, None),
        ("without reduced head", 2, 12, "both", True, None),
        ("without adaptive", 2, 5, "both", False, 3),
        ("early exit alone", 2, 5, "early-exit", False, None),
        ("n-grams alone", None, 5, "n-gram", False, None),
        ("early exit and reduced head", 2, 5, "early-exit", False, 3),
        ("early exit and adaptive", 2, 12, "early-exit", True, None),
    ]
    assert {setting.mode for setting in settings} == {"auto"}
    system = LayerSkipSystem(scripted, settings)
    for setting in settings:
        assert system.answer(setting, [0], 9).text == "abcdefabc"
    with_text = settings_of(model(exit_layer=2, draft_text=(1, 2, 3)), modes=(), ablation=True)[1:]
    assert {s.label for s in with_text} - {s.label for s in settings} == {"without datastore"}
    without_exit = settings_of(model(), modes=(), ablation=True)[1:]
    assert [s.label for s in without_exit] == ["without adaptive"]


def test_each_source_of_drafts_has_a_row():
    scripted = model(exit_layer=2, draft_text=tuple(encode("abcdefabcdef")))
    settings = settings_of(scripted, modes=(), sources=True)[1:]
    assert rows(settings, "label", "exit_layer", "draft_from", "datastore") == [
        ("drafts from early exit", 2, "early-exit", False),
        ("drafts from n-grams", None, "n-gram", False),
        ("drafts from datastore", None, "datastore", True),
        ("drafts from all sources", 2, "both", True),
    ]
    system = LayerSkipSystem(scripted, settings)
    for setting, source in zip(settings, ("early-exit", "n-gram", "datastore"), strict=False):
        run = system.answer(setting, [0], 30)
        assert run.text == "abcdef" * 5
        assert {s for step in run.steps for s in step.sources} == {source}
    with_auto = settings_of(scripted, modes=("auto",), sources=True, ablation=True)
    configs = [setting.config for setting in with_auto]
    assert len(configs) == len(set(configs))
    bare = settings_of(model(), modes=(), sources=True)[1:]
    assert rows(bare, "label", "draft_from") == [("drafts from n-grams", "n-gram")]


def test_an_exit_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=f"exit layer 9 is out of range: .* has 1 to {LAYERS}"):
        settings_of(model(), exit_layers=(2, 9))


def test_bad_options():
    for options, message in (
        ({"modes": ["fast"]}, "the modes 'fast' is unknown; there are: plain, "),
        ({"baselines": ["vllm"]}, "the baselines 'vllm' is unknown"),
        ({"draft_from": ["luck"]}, "drafts from 'luck' are unknown"),
        ({"repeats": 0}, "repeats is 0"),
        ({"draft_tokens": [2, -1]}, "draft_tokens is -1"),
        ({"baselines": ["transformers"], "temperature": 1.0}, "other systems answer greedily"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**options)


def test_answers_are_those_of_the_model():
    scripted = model(exit_layer=2, draft_tokens=3)
    settings = settings_of(scripted, draft_from=("early-exit", "both"), stop=["d"])
    system = LayerSkipSystem(scripted, settings)
    for setting in settings:
        run = system.answer(setting, [0], 9)
        assert (run.text, run.token_ids) == ("abc", encode("abcd"))
        drafted = sum(step.drafted for step in run.steps)
        assert (drafted > 0) == (setting.mode in ("self-speculative", "auto"))
        assert run.peak_memory_bytes is None or run.peak_memory_bytes > 0


def test_options_of_all_rows_reach_the_answers():
    scripted = model(end_tokens=encode("c"))
    (plain,) = settings_of(scripted, modes=())
    assert LayerSkipSystem(scripted, [plain]).answer(plain, [0], 8).token_ids == encode("abc")
    (plain,) = settings_of(scripted, modes=(), ignore_eos=True, temperature=0.5, seed=7)
    run = LayerSkipSystem(scripted, [plain]).answer(plain, [0], 8)
    assert run.token_ids == encode("abcdefab")
    assert (plain.config.temperature, plain.config.seed) == (0.5, 7)


LAYER, HEAD = 10, 4  # bytes
DRAFTED = ("early-exit",) * 3


def test_bytes_of_weights_that_are_read():
    for exit_layer, steps, read in (
        (None, [Step((1,))] * 3, 3 * 44),
        # Three drafted: layer 1 four times, the head three times; then layers 2-4 and the head.
        (1, [Step((1, 2), 3, 1, DRAFTED)], 7 * LAYER + 4 * HEAD),
        # A fourth token that was discarded: the head once more.
        (1, [Step((1, 2), 3, 1, DRAFTED, discarded=1)], 7 * LAYER + 5 * HEAD),
        # The answer ended with its second token: three were drafted all the same.
        (1, [Step((1, 2, 3, 4), 3, 3, DRAFTED).first(2)], 7 * LAYER + 4 * HEAD),
        # An n-gram follows the drafted tokens: nothing more is read.
        (1, [Step((1, 2, 3), 4, 2, (*DRAFTED, "n-gram"))], 7 * LAYER + 4 * HEAD),
        # Nothing drafted: a plain pass in two parts.
        (1, [Step((1,))], 44),
        (1, [Step((1, 2), 5, 1, ("n-gram",) * 5)], 44),
        (None, [Step((1, 2), 5, 1, ("n-gram",) * 5), Step((1,))], 2 * 44),
    ):
        config = DecodingConfig(mode="self-speculative", exit_layer=exit_layer)
        assert weight_bytes_read(model().decoder, steps, config) == read


def test_early_exit_reads_its_layers_and_a_reduced_head_a_part():
    decoder = model().decoder  # with 300 tokens
    early = DecodingConfig(mode="early-exit", exit_layer=3)
    assert weight_bytes_read(decoder, [Step((1,))], early) == 3 * LAYER + HEAD
    config = DecodingConfig(
        mode="self-speculative", exit_layer=1, draft_vocabulary=tuple(range(100))
    )
    expected = 7 * LAYER + 3 * HEAD / 3 + HEAD
    assert weight_bytes_read(decoder, [Step((1, 2), 3, 1, DRAFTED)], config) == expected


def test_read_bandwidth_counts_bytes_over_the_time_of_a_pass(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("layerskip.bench.machine.device_clock", lambda device: lambda: next(times))
    assert read_bandwidth(model().decoder.device, n_bytes=4096, passes=3) == 4096 / 2.0
