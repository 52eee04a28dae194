"""`DecodingConfig`: validation, defaults of the checkpoint, and what several prompts change."""

import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
from scripted import ScriptedDecoder, encode, scripted_model
from tiny_decoders import PLAIN, speculative

from layerskip.decoding import DecodingConfig, Sampling
from layerskip.decoding.batch import batch_config, can_batch
from layerskip.decoding.config import DEFAULT_DRAFT_TOKENS, MAX_ADAPTIVE_DRAFT_TOKENS
from layerskip.model import CheckpointSettings, StepCosts

L = 12
EMPTY = CheckpointSettings()
TUNED = CheckpointSettings(exit_layer=5, draft_tokens=7)
EXIT_ONLY = CheckpointSettings(exit_layer=5)
VOCABULARY = CheckpointSettings(exit_layer=5, draft_vocabulary=(9, 3, 4))
TEXT = dataclasses.replace(TUNED, draft_text=(1, 2, 3))
MOST = MAX_ADAPTIVE_DRAFT_TOKENS
NAN, INFINITY = float("nan"), float("inf")


def auto(exit_layer, draft_tokens, **options):
    draft_from = "n-gram" if exit_layer is None else "both"
    options = {"draft_from": draft_from, "adaptive": True, **options}
    return speculative(exit_layer, draft_tokens, **options)


def early(exit_layer):
    return DecodingConfig(mode="early-exit", exit_layer=exit_layer)


def resolved(options, settings=EMPTY, n_layers=L, **more):
    return DecodingConfig(**options).resolve(settings, n_layers, **more)


SELF = {"mode": "self-speculative"}


@pytest.mark.parametrize(
    ("options", "settings", "expected"),
    [
        # auto: n-grams, and the early exit where the checkpoint or the caller names one
        ({}, EMPTY, auto(None, MOST)),
        ({}, CheckpointSettings(draft_tokens=MOST + 5), auto(None, MOST + 5)),
        ({}, TUNED, auto(5, MOST)),
        ({}, EXIT_ONLY, auto(5, MOST)),
        ({}, VOCABULARY, auto(5, MOST, draft_vocabulary=(9, 3, 4))),
        ({}, TEXT, auto(5, MOST, datastore=(1, 2, 3))),
        ({"exit_layer": 3}, EMPTY, auto(3, MOST)),
        ({"draft_tokens": 2}, EMPTY, auto(None, 2)),
        ({"draft_tokens": 0}, TUNED, auto(5, 0)),
        # each part of it alone
        ({"draft_from": "early-exit"}, TEXT, auto(5, MOST, draft_from="early-exit")),
        ({"draft_from": "n-gram"}, VOCABULARY, auto(None, MOST)),
        ({"adaptive": False}, TUNED, auto(5, 7, adaptive=False)),
        ({"draft_vocabulary": 0}, VOCABULARY, auto(5, MOST)),
        ({"draft_vocabulary": ()}, VOCABULARY, auto(5, MOST)),
        ({"draft_vocabulary": 2}, VOCABULARY, auto(5, MOST, draft_vocabulary=(9, 3))),
        ({"draft_vocabulary": (1, 2)}, EMPTY, auto(L // 4, MOST, draft_vocabulary=(1, 2))),
        ({"datastore": ()}, TEXT, auto(5, MOST)),
        ({"datastore": (7, 8)}, TEXT, auto(5, MOST, datastore=(7, 8))),
        # plain, whatever the checkpoint says
        ({"mode": "plain"}, CheckpointSettings(exit_layer=L + 1), PLAIN),
        # early exit
        ({"mode": "early-exit"}, EMPTY, early(L // 4)),
        ({"mode": "early-exit"}, TUNED, early(5)),
        ({"mode": "early-exit", "exit_layer": L}, TUNED, early(L)),
        # self-speculative: nothing is on that was not asked for
        (SELF, EMPTY, speculative(L // 4, DEFAULT_DRAFT_TOKENS)),
        (SELF, VOCABULARY, speculative(5, DEFAULT_DRAFT_TOKENS)),
        (SELF, TEXT, speculative(5, 7)),
        ({**SELF, "exit_layer": L, "draft_tokens": 0}, TUNED, speculative(L, 0)),
        ({**SELF, "draft_from": "both"}, TEXT, speculative(5, 7, draft_from="both")),
        ({**SELF, "draft_from": "n-gram"}, TEXT, speculative(None, 7, draft_from="n-gram")),
        # the caller's exit layer replaces one of the checkpoint that is wrong
        ({**SELF, "exit_layer": 4}, CheckpointSettings(exit_layer=L + 1), speculative(4, 5)),
    ],
)
def test_open_options_come_from_the_checkpoint_and_the_mode(options, settings, expected):
    config = resolved(options, settings)
    assert config == expected
    assert config.resolve(settings, L) == config  # resolving twice changes nothing
    assert config.resolve(EMPTY, L) == config


def test_the_default_exit_is_never_before_the_first_layer():
    assert resolved({"mode": "early-exit"}, n_layers=2) == early(1)


def test_a_draft_vocabulary_has_the_end_tokens_and_fits_the_model():
    settings = CheckpointSettings(exit_layer=2, draft_vocabulary=(9, 3, 4))
    model = {"vocab_size": 40, "eos_token_ids": (1, 99)}
    for options, expected in (({"draft_vocabulary": 2}, (9, 3, 1)), ({}, (9, 3, 4, 1))):
        config = resolved(options, settings, **model)
        assert config.draft_vocabulary == expected
        assert config.resolve(settings, L, **model) == config
    assert resolved({"draft_vocabulary": 3}, **model).draft_vocabulary == (0, 1, 2)
    for bad in ((40,), (-1, 3)):
        with pytest.raises(ValueError, match="1 or more tokens, of 0 to 39"):
            resolved({"draft_vocabulary": bad}, **model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "the mode 'fast' is unknown; there are: auto, plain, early-exit, self-"),
        ({"draft_from": "text"}, "drafts from 'text' are unknown; there are: early-exit, n-gram,"),
        ({"draft_from": "n-gram+text"}, r"drafts from 'n-gram\+text' are unknown"),
        ({"mode": "plain", "exit_layer": 3}, "plain decoding drafts nothing; leave out"),
        ({"mode": "plain", "draft_tokens": 0}, "plain decoding drafts nothing"),
        ({"mode": "plain", "datastore": (7,)}, "plain decoding drafts nothing"),
        ({"mode": "early-exit", "draft_tokens": 2}, "early exit drafts nothing; leave out"),
        ({"mode": "early-exit", "adaptive": True}, "early exit drafts nothing"),
        ({"draft_from": "n-gram", "exit_layer": 3}, "drafts from n-grams have no exit layer"),
        ({"draft_from": "n-gram", "draft_vocabulary": (1,)}, "or draft vocabulary"),
        ({"draft_from": "early-exit", "datastore": (7,)}, "a datastore is searched for n-grams"),
        ({**SELF, "datastore": (7,)}, "a datastore is searched for n-grams"),
        # ranges
        ({"draft_tokens": -1}, "draft_tokens is -1, it has to be 0 or above"),
        ({"draft_vocabulary": -1}, "draft_vocabulary is -1, it has to be 0 or above"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, it has to be 1 or above"),
        ({"seed": 2**64}, "seed is 18446744073709551616, it has to be from -9"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        *(({"temperature": v}, f"temperature is {v}") for v in (-0.1, NAN, INFINITY)),
        *(({"top_k": v}, f"top_k is {v}, it has to be 1 or above") for v in (0, -1)),
        *(({"top_p": v}, f"top_p is {v}, it has to be above 0 and") for v in (0.0, -0.5, 1.1, NAN)),
        *(({"min_p": v}, f"min_p is {v}, it has to be from 0 to 1") for v in (-0.1, 1.1, NAN)),
        *(
            ({"repetition_penalty": v}, f"repetition_penalty is {v}, it has to be above 0")
            for v in (0.0, -1.0, INFINITY, NAN)
        ),
        # types
        ({"seed": 1.0}, "seed is 1.0, it has to be an integer"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', it has to be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True, it has to be an integer"),
        ({"exit_layer": "2"}, "exit_layer is '2', it has to be an integer"),
        ({"top_k": 1.5}, "top_k is 1.5, it has to be an integer"),
        ({"temperature": "hot"}, "temperature is 'hot', it has to be a number"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\], it has to be a number"),
        ({"repetition_penalty": False}, "repetition_penalty is False, it has to be a number"),
        ({"adaptive": 1}, "adaptive is 1, it has to be True or False"),
        ({"draft_vocabulary": 1.5}, "draft_vocabulary is 1.5, it has to be token ids"),
        ({"draft_vocabulary": ["a"]}, "draft_vocabulary is 'a', it has to be an integer"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DecodingConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "repetition_penalty", "mode"])
def test_options_that_have_a_value_cannot_be_none(name):
    with pytest.raises(ValueError, match=f"{name.split('_')[0]}.* None"):
        DecodingConfig(**{name: None})


@pytest.mark.parametrize("exit_layer", [0, L + 1, -1])
def test_an_exit_layer_has_to_be_one_of_the_model(exit_layer):
    with pytest.raises(ValueError, match=f"exit layer {exit_layer} is out of range: .* 1 to 12"):
        resolved({"exit_layer": exit_layer})
    with pytest.raises(ValueError, match=r"exit layer is 13, but it has 12 layers; name another"):
        resolved({}, CheckpointSettings(exit_layer=L + 1))


def test_a_config_is_frozen_and_hashable():
    config = DecodingConfig(draft_vocabulary=[3, 4], datastore=numpy.arange(3), stop="END")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 1.0
    with pytest.raises(TypeError):
        DecodingConfig("plain")
    assert (config.draft_vocabulary, config.datastore) == ((3, 4), (0, 1, 2))
    assert config.stop == ("END",)
    assert hash(config) == hash(dataclasses.replace(config))
    assert DecodingConfig(stop=["a", "b"]).stop == ("a", "b")
    assert DecodingConfig(stop=None).stop == ()


def test_overrides_replace_options_of_a_config():
    config = DecodingConfig(temperature=0.5, seed=3)
    changed = DecodingConfig.from_options(config, {"seed": 4, "draft_text": (5,)})
    assert changed == DecodingConfig(temperature=0.5, seed=4, datastore=(5,))
    assert DecodingConfig.from_options(None, {}) == DecodingConfig()
    with pytest.raises(ValueError, match="the option 'max_tokens' is unknown; there are: adaptive"):
        DecodingConfig.from_options(config, {"max_tokens": 3})


def test_numbers_of_other_libraries_are_converted():
    config = DecodingConfig(
        exit_layer=numpy.int64(2), max_new_tokens=torch.tensor(6), temperature=numpy.float32(1.0)
    )
    assert config == DecodingConfig(exit_layer=2, max_new_tokens=6, temperature=1.0)
    assert type(config.exit_layer) is type(config.max_new_tokens) is int
    assert type(config.temperature) is float


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (PLAIN, "plain"),
        (early(2), "early-exit"),
        (speculative(2, 3), "self-speculative"),
        (speculative(2, 3, draft_from="both"), "self-speculative"),
        (speculative(None, 3, draft_from="n-gram"), "n-gram"),
    ],
)
def test_drafts_without_an_exit_have_their_own_mode_in_results(config, mode):
    assert config.reported_mode == mode
    assert config.num_layers_to_run(L) == (2 if mode == "early-exit" else L)


def test_a_row_names_large_options_briefly():
    row = DecodingConfig(draft_vocabulary=(1, 2, 3), datastore=(4, 5), temperature=0.5).to_row()
    assert (row["draft_vocabulary"], row["datastore"], row["temperature"]) == (3, True, 0.5)
    assert DecodingConfig(datastore=Path("a.table")).to_row()["datastore"] == "a.table"
    assert DecodingConfig().to_row()["datastore"] is False
    assert "datastore" not in repr(DecodingConfig(datastore=(4, 5)))


def test_plain_and_sampling_are_parts_of_a_config():
    config = speculative(2, 3, temperature=0.5, top_k=4, seed=1, draft_vocabulary=(1,))
    assert config.plain() == DecodingConfig(mode="plain", temperature=0.5, top_k=4, seed=1)
    assert config.sampling == Sampling(temperature=0.5, top_k=4)
    assert DecodingConfig().greedy
    assert not config.greedy


# --- several prompts ----------------------------------------------------------------------------


def measured(*passes, **changes):
    costs = {"exit_layer": 5, "draft_step": 0.3, "draft_tokens_scored": 300, "head": 0.1}
    kind = {"dtype": "float32", "weights": "16bit", "device": "cpu", "kernels": "pytorch"}
    return StepCosts(**kind, **costs | changes, passes=passes, overhead=0.0)


@pytest.mark.parametrize(
    ("costs", "contexts", "drafts"),
    [
        (measured(1.0, 1.0), [0] * 8, True),  # positions are free
        (measured(1.0, 2.0), [0] * 8, False),  # each costs as much as a step
        (measured(1.0, 1.0, 1.0, 1.0, 2.0), [0] * 2, True),  # free up to four
        (measured(1.0, 1.0, 1.0, 1.0, 2.0), [0] * 4, False),
        # A draft reads the keys and values of its layers for every token.
        (measured(1.0, 1.3, exit_layer=2), [0] * 2, True),
        (measured(1.0, 1.3, exit_layer=2), [10_000] * 2, False),
    ],
)
def test_a_batch_drafts_where_that_pays(costs, contexts, drafts):
    config = resolved({}, dataclasses.replace(TUNED, exit_layer=costs.exit_layer))
    expected = dataclasses.replace(config, draft_from="early-exit") if drafts else PLAIN
    assert batch_config(config, ScriptedDecoder([1]), costs, contexts) == expected
    assert can_batch(expected)
    assert not can_batch(config)
    assert not can_batch(dataclasses.replace(expected, repetition_penalty=1.2))


def test_a_batch_drafts_where_its_head_is_small():
    config, costs = resolved({}, TUNED), measured(1.0, 1.3, head=0.9)
    assert batch_config(config, ScriptedDecoder([1]), costs, [0] * 2) == PLAIN
    reduced = dataclasses.replace(config, draft_vocabulary=(0, 1))
    batch = batch_config(reduced, ScriptedDecoder([1]), costs, [0] * 2)
    assert batch.draft_vocabulary == (0, 1)


def test_a_batch_without_an_exit_is_plain():
    assert batch_config(resolved({}), ScriptedDecoder([1]), None, [8, 8]) == PLAIN


# --- through a model ----------------------------------------------------------------------------


def test_a_model_refuses_bad_options_before_anything_runs(monkeypatch):
    model = scripted_model(encode("ab"))
    monkeypatch.setattr(model.decoder, "run", None)
    for options, message in (
        ({"mode": "fast"}, "mode 'fast'"),
        ({"exit_layer": 9}, "exit layer 9"),
        ({"max_tokens": 3}, "the option 'max_tokens' is unknown"),
        ({"stop": [""]}, "a stop string has to be a text"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "a stop string"),
        ({"datastore": (10**6,)}, "token ids of 0 to 299"),
    ):
        with pytest.raises(ValueError, match=message):
            model.answer([0], **options)


def test_a_text_is_a_datastore_of_the_tokenizer_s_tokens():
    model = scripted_model([1], vocab_size=300)
    assert model.resolve(datastore="ab").datastore == tuple(encode("ab"))
    assert model.resolve(draft_text="ab") == model.resolve(datastore="ab")
    with pytest.raises(ValueError, match="token ids of 0 to 79"):
        scripted_model([1], vocab_size=80).answer([0], draft_from="n-gram", datastore="zz")
    with pytest.raises(ValueError, match="no tokenizer; give the datastore as token ids"):
        scripted_model([1], tokenizer=None).resolve(datastore="ab")
