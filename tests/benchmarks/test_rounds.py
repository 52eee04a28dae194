"""Rounds held against plain steps."""

import dataclasses

import pytest
from rounds import compared

from layerskip import LayerSkipModel


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_round_is_in_a_group(folder, temperature):
    model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    model.settings = dataclasses.replace(model.settings, exit_layer=2)
    prompts = [("letters", "abcabcabcabcabc"), ("words", "to be or not to be")]
    found = compared(model, prompts, {"max_new_tokens": 30, "temperature": temperature})
    assert set(found["by_category"]) == {"letters", "words"}
    assert found["all"]["speedup"] == pytest.approx(found["all"]["auto"] / found["all"]["plain"])
    groups = found["rounds"]
    assert [group["rounds"] for group in groups] == sorted(
        (group["rounds"] for group in groups), reverse=True
    )
    assert {group["source"] for group in groups} <= {"model", "n-gram", "early-exit"}
    assert all(group["measured"] > 0 and group["thought"] > 0 for group in groups)
    plain = next(group for group in groups if group["source"] == "model")
    assert plain["thought"] == pytest.approx(1.0)
