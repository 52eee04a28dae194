"""The draft vocabulary: its choice of tokens, and its place in a checkpoint."""

import dataclasses
import json

import pytest
import torch

from layerskip.model import load
from layerskip.model.checkpoint import text_of_ids
from layerskip.model.draft_data import MAX_DRAFT_VOCABULARY, worth_drafting
from tiny_models import COSTS, reference


def test_a_token_has_to_come_up_as_often_as_its_row_costs():
    counts = {5: 60, 8: 30, 2: 9, 7: 1}
    assert worth_drafting(counts, row_share=0.02, vocab_size=100) == (5, 8, 2)
    assert worth_drafting(counts, row_share=0.0, vocab_size=100) == (5, 8, 2, 7)
    assert worth_drafting(counts, row_share=0.5, vocab_size=100, always=[2]) == (2, 5)


def test_a_list_that_saves_little_is_none():
    assert worth_drafting({1: 1, 2: 1, 3: 1}, row_share=0.0, vocab_size=4) == (1, 2, 3)
    assert worth_drafting({1: 1, 2: 1, 3: 1}, row_share=0.0, vocab_size=3) is None
    assert worth_drafting({}, row_share=0.0, vocab_size=100) is None


def test_a_list_is_no_longer_than_is_worth_its_place():
    counts = dict.fromkeys(range(MAX_DRAFT_VOCABULARY + 5), 1)
    assert worth_drafting(counts, row_share=0.0, vocab_size=10 * MAX_DRAFT_VOCABULARY) == tuple(
        range(MAX_DRAFT_VOCABULARY)
    )


def loaded(folder, own):
    reference("llama2").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"layerskip": own}))
    return load(folder, dtype=torch.float32).settings


def test_list_and_costs_travel(tmp_path):
    in_8_bits = dataclasses.replace(COSTS, weights="int8", head=0.2)
    costs = [COSTS.to_dict(), in_8_bits.to_dict()]
    settings = loaded(tmp_path, {"draft_vocabulary": text_of_ids([9, 3, 4]), "costs": costs})
    assert settings.draft_vocabulary == (9, 3, 4, 2)  # the end token too
    assert settings.costs == (COSTS, in_8_bits)
    assert settings.measured_for("float32", "16bit", "cpu", "pytorch", "here").measured == COSTS
    assert settings.measured_for("float32", "int8", "cpu", "pytorch", "here").measured == in_8_bits
    for other in (
        ("bfloat16", "16bit", "cpu", "pytorch", "here"),
        ("float32", "int4", "cpu", "pytorch", "here"),
        ("float32", "16bit", "cuda", "pytorch", "here"),
        ("float32", "16bit", "cpu", "compiled", "here"),
        ("float32", "16bit", "cpu", "pytorch", "elsewhere"),
    ):
        assert settings.measured_for(*other).measured is None


def test_what_cannot_be_read_is_named_and_done_without(tmp_path):
    """It only makes answers faster, and tune writes it anew."""
    for own, message in (
        ({"draft_vocabulary": "1 2 x"}, "draft_vocabulary in .* has to be token ids"),
        ({"draft_vocabulary": "1 999999"}, "draft_vocabulary in .* has to be token ids"),
        ({"draft_vocabulary": [1]}, "draft_vocabulary in .* has to be token ids"),
        ({"draft_text": "1 -2"}, "draft_text in .* has to be token ids"),
        ({"costs": [{"passes": "1.0"}]}, "costs in .* cannot be read .*: tune again"),
        ({"costs": [COSTS.to_dict() | {"new": 1}]}, "tune again"),
        ({"costs": [COSTS.to_dict() | {"head": 0}]}, "costs are numbers above 0"),
        ({"costs": 7}, "tune again"),
        ({"costs": [COSTS.to_dict(), 7]}, "tune again"),
    ):
        with pytest.warns(UserWarning, match=message):
            settings = loaded(tmp_path, own)
        assert (settings.draft_vocabulary, settings.draft_text) == (None, None)
        assert set(settings.costs) <= {COSTS}
