"""Plain decoding and early exit give the token ids of transformers' `generate`, greedy, in float32."""

import itertools

import pytest
import torch
from tiny_decoders import PLAIN, ids
from transformers import AutoModelForCausalLM

import tiny_models
from layerskip.decoding import Plan, Sampling

PENALTIES = (1.0, 1.3)


def continuations(model, prompts, n, penalty):
    """What transformers generates after prompts of one length, as one batch without padding."""
    tokens = torch.tensor(prompts)
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=n,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("case", tiny_models.CASES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_plain_equals_transformers(case, penalty, tmp_path):
    decoder = tiny_models.checkpoint(case, tmp_path).decoder
    for length in (1, 13):
        prompts = tiny_models.token_ids(case, 3, length).tolist()
        expected = continuations(tiny_models.reference(case), prompts, 30, penalty)
        sampling = Sampling(repetition_penalty=penalty)
        assert [ids(decoder, p, PLAIN, 30, sampling) for p in prompts] == expected


@pytest.mark.parametrize("case", ["llama3.1", "mistral", "qwen2-sliding", "qwen3"])
def test_early_exit_equals_transformers_with_the_first_layers_alone(case, tmp_path):
    decoder = tiny_models.checkpoint(case, tmp_path).decoder
    prompts = tiny_models.token_ids(case, 3, 9).tolist()
    answers = []
    for exit_layer in range(1, tiny_models.LAYERS + 1):
        model = tiny_models.build(case)
        model.model.layers = model.model.layers[:exit_layer]
        model.config.num_hidden_layers = exit_layer
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:exit_layer]
        plan = Plan(mode="early-exit", exit_layer=exit_layer)
        answers.append([ids(decoder, prompt, plan, 20) for prompt in prompts])
        assert answers[-1] == continuations(model, prompts, 20, 1.0), exit_layer
    assert all(a != b for a, b in itertools.pairwise(answers))  # every layer matters


PROMPTS = (
    "The three primary colours that every painter learns about are called",
    "Once upon a time, in a small village by the sea, there lived",
    "To bake a loaf of bread at home you first need to mix",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The capital of Japan is Tokyo, and the capital of Italy is",
    "Question: What is 12 times 7? Answer: Let us compute it step by",
    "Water boils at one hundred degrees Celsius because at that temperature the",
    "Dear Sir or Madam, I am writing to complain about the delivery of",
    "In 1969, two astronauts walked on the Moon for the first time, and",
    "Photosynthesis is the process by which green plants turn sunlight into",
    "import numpy as np\n\nx = np.linspace(0, 1, 100)\ny =",
    "SELECT name, price FROM products WHERE price > 100 ORDER",
    "A good password should be long and hard to guess, so you should",
    "The cat sat on the mat while the dog was sleeping under the",
    "My favourite season of the year is autumn, mainly because the leaves",
    "<ul>\n  <li>First item</li>\n  <li>Second item</li>\n  <li>",
    "Le chat est assis sur la table et il regarde par la",
    "The Pythagorean theorem says that in a right triangle the square of the",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Thank you very much for your kind letter, which I received yesterday; I",
    "An electric car differs from a petrol car mainly in that its",
)


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_folder):
    """transformers reads the same file with a loader of its own."""
    return AutoModelForCausalLM.from_pretrained(
        str(smollm2_folder), gguf_file="model.gguf", dtype=torch.float32
    )


@pytest.mark.real
@pytest.mark.parametrize(
    ("n_prompts", "penalty"),
    [(21, 1.0), (3, 1.3), pytest.param(21, 1.3, marks=pytest.mark.long)],
)
def test_smollm2_plain_equals_transformers(smollm2, smollm2_reference, n_prompts, penalty):
    prompts = [smollm2.tokenize(text)[:10] for text in PROMPTS[:n_prompts]]
    assert [len(prompt) for prompt in prompts] == [10] * n_prompts
    expected = continuations(smollm2_reference, prompts, 32, penalty)
    options = {"mode": "plain", "max_new_tokens": 32, "ignore_eos": True}
    answers = smollm2.generate(prompts, repetition_penalty=penalty, **options)
    assert [answer.token_ids for answer in answers] == expected
