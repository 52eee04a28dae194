"""Plain decoding and early exit give the token ids of transformers' `generate`, greedy, in float32."""

import itertools

import pytest
import torch
from tiny_decoders import PLAIN, ids
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize("case", tiny_models.CASES)
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


PROMPTS = (
    "The three primary colours that every painter learns about are called",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The capital of Japan is Tokyo, and the capital of Italy is",
    "Question: What is 12 times 7? Answer: Let us compute it step by",
    "In 1969, two astronauts walked on the Moon for the first time, and",
    "<ul>\n  <li>First item</li>\n  <li>Second item</li>\n  <li>",
    "Le chat est assis sur la table et il regarde par la",
    "1, 1, 2, 3, 5, 8, 13, 21,",
)


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_folder):
    """Load the same file with the loader of transformers."""
    return AutoModelForCausalLM.from_pretrained(
        str(smollm2_folder), gguf_file="model.gguf", dtype=torch.float32
    )


@pytest.mark.real
@pytest.mark.parametrize(
    ("n_prompts", "penalty"),
    [(4, 1.0), pytest.param(8, 1.3, marks=pytest.mark.long)],
)
def test_smollm2_plain_equals_transformers(smollm2, smollm2_reference, n_prompts, penalty):
    prompts = [smollm2.tokenize(text)[:10] for text in PROMPTS[:n_prompts]]
    assert [len(prompt) for prompt in prompts] == [10] * n_prompts
    expected = continuations(smollm2_reference, prompts, 32, penalty)
    options = {"mode": "plain", "max_new_tokens": 32, "ignore_eos": True}
    answers = smollm2.generate(prompts, repetition_penalty=penalty, **options)
    assert [answer.token_ids for answer in answers] == expected
