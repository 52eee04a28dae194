"""The profile of an answer: parts that add up, of rounds as the answer had them."""

import pytest
from where_time_goes import profile

from layerskip import LayerSkipModel
from layerskip.bench.tasks import Sample, Task


def task(*prompts):
    samples = tuple(Sample(id=prompt, prompt=prompt) for prompt in prompts)
    return Task(name="two", samples=samples, max_new_tokens=40)


@pytest.mark.parametrize("compiled", [True, False])
def test_parts_add_up(folder, compiled, request):
    if compiled:
        request.getfixturevalue("compiled_kernels")
    model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=compiled)
    plain = model.decoder.run
    found = profile(model, task("abcabcabcabcabc", "to be or not to be"), 40)
    parts = found["auto_plain_steps_a_token"]
    assert set(parts) == {"draft", "layers", "head", "rest"}
    assert sum(parts.values()) == pytest.approx(1 / found["speedup"])
    assert all(found["plain_ms_a_token"][part] > 0 for part in ("layers", "head", "rest"))
    assert found["plain_ms_a_token"]["draft"] == 0.0
    assert found["tokens_a_round"] >= 1.0
    assert 0.0 <= found["accepted"] <= 1.0
    assert model.decoder.run == plain  # nothing stays watched


def test_answers_of_one_token_are_refused(folder):
    model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    with pytest.raises(SystemExit, match="one token"):
        profile(model, task("a"), 1)
