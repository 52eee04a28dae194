"""The real SmolLM2-135M: loading and decoding against transformers' own of the same GGUF file."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from layerskip.model import load
from layerskip.model.families import FAMILIES
from layerskip.model.quantize import quantize
from layerskip.model.weights import GgufFile

pytestmark = pytest.mark.real

TEXT = """\
The old harbour lies on the eastern side of the town, where the river widens before it meets the sea.
For three hundred years it was the busiest place for miles around: ships brought timber, salt and
wool, and left again with grain, leather and beer. Every morning the fish market opened before sunrise,
and by eight o'clock the best of the catch had been sold to the inns along the quay. When the railway
came in 1868, most of the trade moved inland. The warehouses stood empty, the cranes rusted, and young
people left to look for work in the factories of the capital. Only a few families stayed, and they
repaired boats, mended nets and told stories about the storms that their grandparents had survived.

Today the harbour is full of life once more. Two of the warehouses have been turned into a museum, in
which visitors can see how a sailing ship was built, from the first drawing to the last coat of paint.
Children like the room with the knots best, because they may try all of them by themselves. Next door
there is a school for boat builders. Its students learn to work with oak and larch, but also with glass
fibre and computers, since most customers want a boat that looks old and behaves like a new one. In
the evening, when the sun goes down behind the church, people sit on the steps that lead to the water,
eat bread with smoked herring, and watch the last ferry return from the islands.
"""
PROMPTS = (
    "The three primary colours that every painter learns about are called",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Le chat est assis sur la table et il regarde par la",
)


@pytest.fixture(scope="module")
def checkpoint(smollm2_folder):
    return load(smollm2_folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint.tokenizer


@pytest.fixture(scope="module")
def tokens(tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXT)])
    assert 250 < ids.shape[1] < 400
    return ids


def nll(logits, tokens):
    """Mean negative log-likelihood in nats a token."""
    return cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).item()


@torch.inference_mode()
def our_nll(decoder, tokens):
    n, layers = tokens.shape[1], len(decoder.layers)
    hidden = decoder.run(decoder.embed(tokens), 0, layers, decoder.new_cache(n))
    return nll(decoder.logits(hidden), tokens)


@pytest.fixture(scope="module")
def theirs(smollm2_folder):
    """Load the same file with the loader of transformers."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2_folder, gguf_file="model.gguf", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def transformers_nll(theirs, tokens):
    with torch.inference_mode():
        return nll(theirs(tokens, use_cache=False).logits, tokens)


@pytest.mark.parametrize("penalty", [1.0, pytest.param(1.3, marks=pytest.mark.long)])
def test_greedy_answers_are_those_of_transformers(smollm2, theirs, penalty):
    prompts = torch.tensor([smollm2.tokenize(text)[:10] for text in PROMPTS])
    options = {"max_new_tokens": 24, "repetition_penalty": penalty}
    expected = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    answers = smollm2.generate(prompts.tolist(), mode="plain", ignore_eos=True, **options)
    assert [answer.token_ids for answer in answers] == expected[:, 10:].tolist()


def test_nll_equals_that_of_transformers(smollm2_folder, tokens, transformers_nll):
    assert 1.5 < transformers_nll < 3.5  # it understands the text
    decoder = load(smollm2_folder, dtype=torch.float32).decoder
    ours = our_nll(decoder, tokens)
    assert ours == pytest.approx(transformers_nll, abs=1e-3)  # float32


def test_nll_in_bfloat16_is_near(checkpoint, tokens, transformers_nll):
    ours = our_nll(checkpoint.decoder, tokens)
    assert ours == pytest.approx(transformers_nll, abs=0.02)  # bfloat16


def test_wrong_row_order_of_queries_and_keys_would_show(
    smollm2_folder, tokens, transformers_nll, monkeypatch
):
    family = dataclasses.replace(FAMILIES["llama"], gguf_rotary="halves")
    monkeypatch.setitem(FAMILIES, "llama", family)
    decoder = load(smollm2_folder, dtype=torch.bfloat16).decoder
    assert our_nll(decoder, tokens) > transformers_nll + 1.0


def test_tokenizer_keeps_the_spaces_before_a_number_together(tokenizer):
    assert tokenizer.tokenize("in  1868") == ["in", "ĠĠ", "1", "8", "6", "8"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_chat_template_and_end_token(checkpoint, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert checkpoint.settings.end_tokens == (end,)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(end) == text.count("<|im_end|>")


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_quantized_weights_are_those_of_the_file(smollm2_folder, weights):
    file = GgufFile(smollm2_folder / "model.gguf")
    decoder = load(smollm2_folder, dtype=torch.float32, weights=weights).decoder

    def read(name):
        values = file.read(f"{name}.weight")
        return quantize(values, 8).dequantize() if weights == "int8" else values

    embedding = file.read("model.embed_tokens.weight")  # stored in 8 bits
    assert torch.equal(decoder.embedding.weight.dequantize(), embedding)
    assert torch.equal(decoder.head.weight.dequantize(), embedding)
    for i, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{i}."
        for product, names in (
            (layer.qkv, [f"self_attn.{x}_proj" for x in "qkv"]),
            (layer.attention_out, ["self_attn.o_proj"]),
            (layer.mlp.gate_up, ["mlp.gate_proj", "mlp.up_proj"]),
            (layer.mlp.down, ["mlp.down_proj"]),
        ):
            expected = torch.cat([read(prefix + name) for name in names])
            assert torch.equal(product.weight.dequantize(), expected)


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_nll_with_quantized_weights_is_near(smollm2_folder, tokens, transformers_nll, weights):
    decoder = load(smollm2_folder, dtype=torch.bfloat16, weights=weights).decoder
    assert our_nll(decoder, tokens) == pytest.approx(transformers_nll, rel=0.01)
    few = tokens[:, :40]
    cache = decoder.new_cache(40)
    steps = []
    for chunk in few.split(8, dim=1):  # the product for few rows
        steps.append(decoder.logits(decoder.run(decoder.embed(chunk), 0, 30, cache)))
        cache.lengths += 8
    float32 = load(smollm2_folder, dtype=torch.float32, weights=weights).decoder
    exact = float32.logits(float32.run(float32.embed(few), 0, 30, float32.new_cache(40)))
    assert nll(torch.cat(steps, dim=1), few) == pytest.approx(nll(exact, few), rel=0.02)
