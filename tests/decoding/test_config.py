"""`DecodingConfig`: validation, defaults of the checkpoint, and what several prompts change."""

import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
from scripted import encode, scripted_model
from tiny_decoders import PLAIN, speculative

from layerskip.decoding import DecodingConfig, Sampling
from layerskip.decoding.config import DEFAULT_DRAFT_TOKENS, MAX_ADAPTIVE_DRAFT_TOKENS
from layerskip.model import CheckpointSettings, StepCosts

L = 12
EMPTY = CheckpointSettings()
TUNED = CheckpointSettings(exit_layer=5, draft_tokens=7)
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


def test_open_options_come_from_the_checkpoint_and_the_mode():
    for options, settings, expected in (
        # auto: n-grams, and the early exit where the checkpoint or the caller names one
        ({}, EMPTY, auto(None, MOST)),
        ({}, CheckpointSettings(draft_tokens=MOST + 5), auto(None, MOST + 5)),
        ({}, TUNED, auto(5, MOST)),
        ({}, VOCABULARY, auto(5, MOST, draft_vocabulary=(9, 3, 4))),
        ({}, TEXT, auto(5, MOST, datastore=(1, 2, 3))),
        ({"exit_layer": 3}, EMPTY, auto(3, MOST)),
        ({"draft_tokens": 0}, TUNED, auto(5, 0)),
        # each part of it alone
        ({"draft_from": "early-exit"}, TEXT, auto(5, MOST, draft_from="early-exit")),
        ({"draft_from": "n-gram"}, VOCABULARY, auto(None, MOST)),
        ({"adaptive": False}, TUNED, auto(5, 7, adaptive=False)),
        ({"draft_vocabulary": 0}, VOCABULARY, auto(5, MOST)),
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
        ({**SELF, "draft_from": "n-gram"}, TEXT, speculative(None, 7, draft_from="n-gram")),
        # the caller's exit layer replaces one of the checkpoint that is wrong
        ({**SELF, "exit_layer": 4}, CheckpointSettings(exit_layer=L + 1), speculative(4, 5)),
    ):
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


def test_bad_values_are_refused_in_one_line():
    for options, message in (
        ({"mode": "fast"}, "the mode 'fast' is unknown; there are: auto, plain, early-exit, self-"),
        ({"draft_from": "text"}, "drafts from 'text' are unknown; there are: early-exit, n-gram,"),
        ({"mode": "plain", "exit_layer": 3}, "plain decoding drafts nothing; leave out"),
        ({"mode": "early-exit", "draft_tokens": 2}, "early exit drafts nothing; leave out"),
        ({"draft_from": "n-gram", "exit_layer": 3}, "drafts from n-grams have no exit layer"),
        ({"draft_from": "n-gram", "draft_vocabulary": (1,)}, "or draft vocabulary"),
        ({"draft_from": "early-exit", "datastore": (7,)}, "a datastore is searched for n-grams"),
        ({**SELF, "datastore": (7,)}, "a datastore is searched for n-grams"),
        # ranges
        ({"draft_tokens": -1}, "draft_tokens is -1, it has to be 0 or above"),
        ({"draft_vocabulary": -1}, "draft_vocabulary is -1, it has to be 0 or above"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, it has to be 1 or above"),
        ({"seed": 2**64}, "it has to be from -9223372036854775808 to 18446744073709551615"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": INFINITY}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0, it has to be 1 or above"),
        ({"top_p": 0.0}, "top_p is 0.0, it has to be above 0 and"),
        ({"top_p": 1.1}, "top_p is 1.1, it has to be above 0 and"),
        ({"min_p": NAN}, "min_p is nan, it has to be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, it has to be above 0"),
        # types
        ({"seed": 1.0}, "seed is 1.0, it has to be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True, it has to be an integer"),
        ({"temperature": "hot"}, "temperature is 'hot', it has to be a number"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\], it has to be a number"),
        ({"adaptive": 1}, "adaptive is 1, it has to be True or False"),
        ({"draft_vocabulary": 1.5}, "draft_vocabulary is 1.5, it has to be token ids"),
        ({"draft_vocabulary": ["a"]}, "draft_vocabulary is 'a', it has to be an integer"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            DecodingConfig(**options)
        assert "\n" not in str(error.value)


def test_options_that_have_a_value_cannot_be_none():
    for name in ("max_new_tokens", "temperature", "mode"):
        with pytest.raises(ValueError, match=f"{name.split('_')[0]}.* None"):
            DecodingConfig(**{name: None})


def test_an_exit_layer_has_to_be_one_of_the_model():
    for exit_layer in (0, L + 1):
        with pytest.raises(
            ValueError, match=f"exit layer {exit_layer} is out of range: .* 1 to 12"
        ):
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


def test_drafts_without_an_exit_have_their_own_mode_in_results():
    for config, mode in (
        (PLAIN, "plain"),
        (early(2), "early-exit"),
        (speculative(2, 3, draft_from="both"), "self-speculative"),
        (speculative(None, 3, draft_from="n-gram"), "n-gram"),
    ):
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
