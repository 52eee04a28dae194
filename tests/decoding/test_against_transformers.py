"""Plain decoding and early exit give the token ids of transformers' `generate`, greedy, in float32.

SmolLM2 is compared in tests/model/test_smollm2.py, where it is loaded.
"""

import itertools

import pytest
import torch
from tiny_decoders import PLAIN, ids

import tiny_models
from layerskip.decoding import DecodingConfig


def continuations(model, prompts, n, penalty):
    """Generate with transformers after prompts of one length, as one batch without padding."""
    tokens = torch.tensor(prompts)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=n,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, tokens.shape[1] :].tolist()


# The others differ in what their logits show; see tests/model/test_families.py.
@pytest.mark.parametrize("case", [*tiny_models.ONE_OF_EACH, "phi4-mini", "qwen2-sliding"])
def test_plain_equals_transformers(case, tmp_path):
    decoder = tiny_models.checkpoint(case, tmp_path).decoder
    for length, penalty in ((1, 1.0), (13, 1.0), (13, 1.3)):
        prompts = tiny_models.token_ids(case, 2, length).tolist()
        expected = continuations(tiny_models.reference(case), prompts, 16, penalty)
        answers = [ids(decoder, p, PLAIN, 16, repetition_penalty=penalty) for p in prompts]
        assert answers == expected


@pytest.mark.parametrize("case", ["llama3.1", "mistral", "qwen2-sliding", "qwen3"])
def test_early_exit_equals_transformers_with_the_first_layers_alone(case, tmp_path):
    decoder = tiny_models.checkpoint(case, tmp_path).decoder
    prompts = tiny_models.token_ids(case, 2, 9).tolist()
    answers = []
    for exit_layer in range(1, tiny_models.LAYERS + 1):
        model = tiny_models.build(case)
        model.model.layers = model.model.layers[:exit_layer]
        model.config.num_hidden_layers = exit_layer
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:exit_layer]
        config = DecodingConfig(mode="early-exit", exit_layer=exit_layer)
        answers.append([ids(decoder, prompt, config, 20) for prompt in prompts])
        assert answers[-1] == continuations(model, prompts, 20, 1.0), exit_layer
    assert all(a != b for a, b in itertools.pairwise(answers))  # every layer matters
