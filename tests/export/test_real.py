"""SmolLM2, exported by the commands of docs/how-to/export.md, in llama.cpp and transformers."""

import pytest
import torch
from llama_server import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from exit_states import exit_states
from layerskip.export import open_source, to_gguf, to_hf
from layerskip.model import load

pytestmark = pytest.mark.real

PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "In 1868  the railway reached 25 towns, and",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 4, 8, 16,",
]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def answers(smollm2):
    """Our greedy answers in float32: token ids of the prompt and of the answer."""
    return [
        (
            smollm2.tokenize(prompt),
            smollm2.generate(
                prompt, mode="plain", max_new_tokens=NEW_TOKENS, ignore_eos=True
            ).token_ids,
        )
        for prompt in PROMPTS
    ]


@pytest.fixture
def exported(smollm2_folder, tmp_path):
    """Export at some weights; skip where llama.cpp is not installed."""
    pytest.importorskip("xllamacpp")

    def export(weights, exit_layer=None):
        path = tmp_path / f"{weights}-{exit_layer}.gguf"
        to_gguf(open_source(smollm2_folder, exit_layer), path, weights=weights)
        return path

    return export


def test_llama_cpp_gives_the_same_greedy_text(exported, answers):
    model = Llama(exported("f32"), n_ctx=256)
    for prompt, (ids, answer) in zip(PROMPTS, answers, strict=True):
        assert model.tokenize(prompt) == ids
        tokens, _ = model.generate(ids, NEW_TOKENS)
        assert tokens == answer


@pytest.mark.long
def test_llama_cpp_drafts_with_an_exported_draft(exported, answers):
    model = Llama(exported("f32"), n_ctx=256, draft=exported("f16", exit_layer=25))
    for ids, answer in answers[:3]:
        tokens, n_drafted = model.generate(ids, NEW_TOKENS)
        assert tokens == answer
        assert n_drafted


@pytest.mark.parametrize(
    "weights",
    ["q4_0", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("bf16", "q8_0"))],
)
def test_llama_cpp_reads_every_kind_as_we_do(weights, exported):
    path = exported(weights)
    ours = load(path, dtype=torch.float32)
    ids, n_layers = ours.tokenizer.encode(PROMPTS[0]), len(ours.decoder.layers)
    states = exit_states(ours.decoder, ids, [n_layers])[n_layers]
    with torch.inference_mode():
        expected = ours.decoder.logits(states)[0, -5:].log_softmax(-1)
    found = Llama(path, n_ctx=256).log_probs(ids, expected.shape[-1], last=5)
    divergence = (expected.exp() * (expected - found)).sum(-1)  # nats, at the last positions
    # llama.cpp rounds activations to 8 bits before it multiplies them with quantized weights, and
    # to the file's 16 bits otherwise. A matrix in the wrong place or order costs several nats.
    assert divergence.median() < (0.002 if weights == "bf16" else 0.05)


def test_its_own_gguf_file_comes_out_as_it_went_in(smollm2_folder, tmp_path):
    written = to_gguf(open_source(smollm2_folder), tmp_path / "m.gguf", weights="q4_1")
    assert written.carried_over == written.tensors == 272
    assert written.stored_as == {"Q4_1": 210, "F32": 61, "Q8_0": 1}


@pytest.mark.long
def test_transformers_gives_the_same_greedy_text_with_and_without_the_draft(
    smollm2_folder, answers, tmp_path
):
    to_hf(open_source(smollm2_folder), tmp_path / "model")
    to_hf(open_source(smollm2_folder, 20), tmp_path / "draft", weights="bf16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    for assistant, some in [(None, slice(3)), (draft, slice(2))]:
        for prompt, (ids, answer) in zip(PROMPTS[some], answers[some], strict=True):
            inputs = tokenizer(prompt, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == ids
            out = model.generate(
                **inputs,
                assistant_model=assistant,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
            )
            assert out[0, len(ids) :].tolist() == answer
