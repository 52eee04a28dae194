"""The rows of this package, and what is asked of the model for each."""

import types

import pytest
from scripted import LAYERS, encode, scripted_model

from layerskip.bench.machine import read_bandwidth, weight_bytes_read
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.decoding import Step
from layerskip.model import CheckpointSettings


def model(answer="abcdef", end_tokens=(), **settings):
    made = scripted_model(
        encode(answer), settings=CheckpointSettings(end_tokens=tuple(end_tokens), **settings)
    )
    made.decoder.weight_bytes, made.decoder.head = 44, types.SimpleNamespace(weight_bytes=4)
    return made


def rows(settings):
    return [(s.mode, s.exit_layer, s.draft_tokens) for s in settings]


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


def test_what_is_not_named_is_the_checkpoints_or_the_default():
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


def test_who_watches_sees_each_answer_and_changes_none():
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


def test_other_drafts():
    found = settings_of(
        model(),
        modes=("self-speculative",),
        exit_layers=(1, 2),
        draft_tokens=(3,),
        draft_from=("n-gram", "both"),
        draft_vocabulary=(50,),
        adaptive=True,
    )
    fields = ("exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary")
    assert [tuple(getattr(s, name) for name in fields) for s in found[1:]] == [
        (None, 3, "n-gram", False, None),
        (1, 3, "both", False, None),
        (1, 3, "both", False, 50),
        (1, 12, "both", True, None),
        (2, 3, "both", False, None),
        (2, 3, "both", False, 50),
        (2, 12, "both", True, None),
    ]


def test_an_ablation_takes_parts_away_and_leaves_parts_alone():
    made = model(exit_layer=2, draft_vocabulary=(7, 5))
    found = settings_of(made, modes=(), ablation=True)[1:]
    fields = ("label", "exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary")
    assert [tuple(getattr(s, name) for name in fields) for s in found] == [
        ("without n-grams", 2, 12, "early-exit", True, 2),
        ("without early exit", None, 12, "n-gram", True, None),
        ("without short head", 2, 12, "both", True, None),
        ("without adaptive", 2, 5, "both", False, 2),
        ("early exit alone", 2, 5, "early-exit", False, None),
        ("n-grams alone", None, 5, "n-gram", False, None),
        ("early exit and short head", 2, 5, "early-exit", False, 2),
        ("early exit and adaptive", 2, 12, "early-exit", True, None),
    ]
    system = LayerSkipSystem(made, found)
    for setting in found:
        assert system.answer(setting, [0], 9).text == "abcdefabc"
    texted = settings_of(model(exit_layer=2, draft_text=(1, 2, 3)), modes=(), ablation=True)[1:]
    more = {s.label for s in texted} - {s.label for s in found}
    assert more == {"without draft text"}


def test_an_ablation_has_no_rows_of_what_is_not_there():
    found = settings_of(model(), modes=(), ablation=True)[1:]
    assert [s.label for s in found] == ["without adaptive"]


def test_an_exit_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match=f"exit layer 9 is out of range: this model has 1 to {LAYERS}"
    ):
        settings_of(model(), exit_layers=(2, 9))


def test_answers_are_those_of_the_model():
    made = model(exit_layer=2, draft_tokens=3)
    settings = settings_of(made, draft_from=("early-exit", "both"), adaptive=False)
    system = LayerSkipSystem(made, settings, stop=["d"])
    for setting in settings:
        run = system.answer(setting, [0], 9)
        assert (run.text, run.token_ids) == ("abc", encode("abcd"))
        drafted = sum(step.drafted for step in run.steps)
        assert (drafted > 0) == (setting.mode in ("self-speculative", "auto"))
        assert run.peak_memory_bytes is None or run.peak_memory_bytes > 0


def test_ignoring_the_end():
    made = model(end_tokens=encode("c"))
    setting = settings_of(made)[0]
    assert LayerSkipSystem(made, [setting]).answer(setting, [0], 8).token_ids == encode("abc")
    run = LayerSkipSystem(made, [setting], ignore_eos=True).answer(setting, [0], 8)
    assert run.token_ids == encode("abcdefab")


@pytest.mark.parametrize(
    ("exit_layer", "drafting", "steps", "read"),
    [
        # Four layers of 10 bytes each and a head of 4.
        (None, False, [Step((1,))] * 3, 3 * 44),
        (3, False, [Step((1,))], 34),
        # Three drafted: layer 1 four times, the head three times; then layers 2-4 and the head.
        (1, True, [Step((1, 2), 3, 1, "early-exit", from_exit=3)], 4 * 10 + 3 * 4 + 30 + 4),
        # The same, and a fourth token that was left out as unsure: the head once more.
        (
            *(1, True, [Step((1, 2), 3, 1, "early-exit", from_exit=3, refused=1)]),
            4 * 10 + 4 * 4 + 30 + 4,
        ),
        # The answer ended with its second token: three were drafted all the same.
        (
            *(1, True, [Step((1, 2, 3, 4), 3, 3, "early-exit", from_exit=3).first(2)]),
            4 * 10 + 3 * 4 + 30 + 4,
        ),
        # So were three of which the answer has one, with an n-gram behind them.
        (
            *(1, True, [Step((1, 2, 3), 4, 2, "early-exit", from_exit=3).first(1)]),
            4 * 10 + 3 * 4 + 34,
        ),
        # Nothing drafted: a plain pass in two parts.
        (1, True, [Step((1,), 0, 0, "early-exit")], 44),
        # Drafts from the text cost nothing: a pass.
        (1, True, [Step((1, 2), 5, 1, "n-gram")], 44),
        (None, True, [Step((1, 2), 5, 1, "n-gram"), Step((1,))], 2 * 44),
    ],
)
def test_bytes_of_weights_that_are_read(exit_layer, drafting, steps, read):
    found = weight_bytes_read(model().decoder, steps, exit_layer=exit_layer, drafting=drafting)
    assert found == read


def test_a_draft_vocabulary_reads_a_part_of_the_head():
    decoder = model().decoder  # with 300 tokens; a head of 4 bytes
    step = Step((1, 2), 3, 1, "early-exit", from_exit=3)
    options = {"exit_layer": 1, "drafting": True, "draft_vocabulary": 100}
    assert weight_bytes_read(decoder, [step], **options) == 4 * 10 + 3 * 4 / 3 + 30 + 4


def test_read_bandwidth_counts_bytes_over_the_time_of_a_pass(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("layerskip.bench.machine.device_clock", lambda device: lambda: next(times))
    assert read_bandwidth(model().decoder.device, n_bytes=4096, passes=3) == 4096 / 2.0
