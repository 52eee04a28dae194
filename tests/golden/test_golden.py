"""Greedy outputs of the tiny models, recorded once: every way of decoding has to give them."""

import json
from pathlib import Path

import pytest

from layerskip import LayerSkipModel
from tiny_models import ONE_OF_EACH, reference, token_ids

GOLDEN = Path(__file__).with_name("greedy.json")
PROMPT_LENGTHS = (3, 17)
NEW_TOKENS = 24
MODES = {
    "plain": {"mode": "plain"},
    "self-speculative": {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 3},
    "adaptive": {"mode": "self-speculative", "exit_layer": 3, "adaptive": True},
    "n-gram": {"mode": "self-speculative", "draft_from": "n-gram"},
    "auto": {"mode": "auto"},
    "auto with an exit": {"mode": "auto", "exit_layer": 2},
}


def model_of(case, folder):
    reference(case).save_pretrained(folder)
    return LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)


def prompts(case):
    return [token_ids(case, n, seed=n).tolist() for n in PROMPT_LENGTHS]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_greedy_outputs_are_those_recorded(case, tmp_path):
    model, golden = model_of(case, tmp_path), json.loads(GOLDEN.read_text())[case]
    how = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for name, mode in MODES.items():
        answers = [model.generate(prompt, **mode, **how).token_ids for prompt in prompts(case)]
        assert answers == golden, name
    together = model.generate(prompts(case), **MODES["self-speculative"], **how)
    assert [answer.token_ids for answer in together] == golden


if __name__ == "__main__":
    import tempfile

    recorded = {}
    for one in ONE_OF_EACH:
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(one, folder)
            recorded[one] = [
                model.generate(
                    prompt, mode="plain", max_new_tokens=NEW_TOKENS, ignore_eos=True
                ).token_ids
                for prompt in prompts(one)
            ]
    rows = (f'  "{name}": {json.dumps(answers)}' for name, answers in recorded.items())
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
