"""Tiny random decoders whose early exits often, but not always, agree with the last layer."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path

import torch

import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding import DecodingConfig, generate
from layerskip.decoding.batch import Batch
from layerskip.decoding.controller import DraftCosts
from layerskip.decoding.generate import Row
from layerskip.model import Checkpoint, CheckpointSettings, StepCosts, load

LAYERS = tiny_models.LAYERS
FAMILIES = ("llama2", "llama3.1", "smollm2", "mistral", "qwen2", "qwen2-sliding", "qwen3")
# Drafts and rows cost next to nothing, so that even a tiny model's vague drafts are kept.
FREE = StepCosts(
    dtype="float32",
    weights="16bit",
    device="cpu",
    kernels="pytorch",
    exit_layer=1,
    draft_step=1e-3,
    draft_tokens_scored=1,
    head=1e-3,
    passes=(1.0, 1.001),
    overhead=0.0,
)


@functools.cache
def tiny_decoder(
    case,
    upper=0.3,
    weights="16bit",
    kv_cache="auto",
    dtype=torch.float32,
    compiled=False,
    **changes,
):
    """Return a decoder of a case of `tiny_models.CASES`.

    Args:
        case: its name.
        upper: factor on what layers 1 ... L-1 add, so that every exit is near the last one.
        weights: a key of `quantize.WEIGHTS`.
        kv_cache: one of `kv_cache.KV_CACHES`.
        dtype: of hidden states.
        compiled: run in the compiled kernels.
        changes: to the transformers config.
    """
    model = tiny_models.build(case, **changes)
    _scale_upper_layers(model, upper)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = {"weights": weights, "kv_cache": kv_cache, "compiled": compiled}
        return load(Path(folder), dtype=dtype, **options).decoder


def _scale_upper_layers(model, factor):
    """Scale the last product or norm of attention and MLP in all layers but the first."""
    parameters = dict(model.named_parameters())
    has_post_norms = any("post_feedforward_layernorm" in name for name in parameters)
    last = r"post_(attention|feedforward)_layernorm" if has_post_norms else r"(o|down)_proj|dense"
    for name, parameter in parameters.items():
        layer = re.search(rf"layers\.(\d+)\..*\b(?:{last})(?:_4h_to_h)?\b", name)
        if layer and int(layer[1]):
            # Gemma's norms multiply with 1 + weight.
            offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
            parameter.data.add_(offset).mul_(factor).sub_(offset)


def model_of(decoder, **settings):
    """Return a `LayerSkipModel` around a decoder, without files or tokenizer."""
    return LayerSkipModel(
        Checkpoint(
            path=None, decoder=decoder, tokenizer=None, settings=CheckpointSettings(**settings)
        )
    )


def record_contexts(monkeypatch):
    """Return the list of contexts that costs of drafting are computed for from now on."""
    contexts, original = [], DraftCosts.of

    def of(cls, *args):
        contexts.append(args[4])
        return original(*args)

    monkeypatch.setattr(DraftCosts, "of", classmethod(of))
    return contexts


def random_prompt(decoder, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(decoder.architecture.vocab_size, (length,), generator=generator).tolist()


def speculative(exit_layer, draft_tokens, **options):
    """Return a resolved config of self-speculative decoding."""
    options = {"draft_from": "early-exit", "adaptive": False, **options}
    return DecodingConfig(
        mode="self-speculative", exit_layer=exit_layer, draft_tokens=draft_tokens, **options
    )


PLAIN = DecodingConfig(mode="plain")
NGRAMS = speculative(None, 5, draft_from="n-gram")
ALL_DRAFTS = speculative(
    exit_layer=2,
    draft_tokens=6,
    draft_from="both",
    adaptive=True,
    draft_vocabulary=tuple(range(60)),
)


def steps(decoder, prompt, config, n=24, *, eos_token_ids=(), measured=None, **options):
    """Return all steps of one generation; options replace those of the config."""
    config = dataclasses.replace(config, max_new_tokens=n, **options)
    return list(generate(decoder, prompt, config, eos_token_ids=eos_token_ids, measured=measured))


def tokens_of(steps):
    """Return the tokens of some steps."""
    return [token for step in steps for token in step.tokens]


def ids(decoder, prompt, config, n=24, **options):
    """Return the new token ids of one generation; see `steps`."""
    return tokens_of(steps(decoder, prompt, config, n, **options))


def batch_steps(
    decoder, prompts, config, n=24, *, eos_token_ids=(), measured=None, max_num_seqs=64, **options
):
    """Return the steps of each prompt in one batch, with one config or one for each prompt."""
    configs = config if isinstance(config, list) else [config] * len(prompts)
    batch = Batch(decoder, measured=measured, max_num_seqs=max_num_seqs)
    answers = {}
    for prompt, one in zip(prompts, configs, strict=True):
        one = dataclasses.replace(one, max_new_tokens=n, **options)
        row = Row(decoder, prompt, one, eos_token_ids=eos_token_ids, measured=measured)
        answers[row] = []
        batch.add(row)
    for output in batch:
        if output.error is not None:
            raise output.error
        answers[output.row].append(output.step)
    return list(answers.values())


def batch_ids(decoder, prompts, config, n=24, **options):
    """Return the new token ids of each prompt in one batch; see `batch_steps`."""
    return [tokens_of(row) for row in batch_steps(decoder, prompts, config, n, **options)]
