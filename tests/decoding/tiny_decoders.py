"""Tiny random decoders whose early exits agree with the last layer now and then, but not always."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import torch
from layerskip.decoding.draft_costs import DraftCosts

import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding import Plan, Sampling, generate
from layerskip.model import Checkpoint, CheckpointSettings, load

LAYERS = tiny_models.LAYERS
FAMILIES = ("llama2", "llama3.1", "smollm2", "mistral", "qwen2", "qwen2-sliding", "qwen3")
GREEDY = Sampling()


@functools.cache
def tiny_decoder(case, upper=0.3, weights="16bit", **changes):
    """A case of `tiny_models.CASES` in float32.

    Args:
        case: its name.
        upper: what layers 1 ... L-1 add is scaled by this, so that every exit is near the last one.
        weights: how they are kept.
        changes: to the transformers config.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.build(case, **changes).save_pretrained(folder)
        decoder = load(Path(folder), dtype=torch.float32, weights=weights).decoder
    decoder.layers = [
        layer if i == 0 else _scaled(layer, upper) for i, layer in enumerate(decoder.layers)
    ]
    return decoder


class _Scaled:
    """A product or a norm whose result is multiplied by a factor."""

    def __init__(self, part, factor):
        self.part, self.factor, self.weight_bytes = part, factor, 0

    def __call__(self, x, residual=None):
        y = self.part(x) * self.factor
        return y if residual is None else y + residual


def _scaled(layer, factor):
    """A copy of a layer that adds `factor` times as much."""
    last = {
        "attention_out": "attention_post_norm" if layer.attention_post_norm else "attention_out",
        "mlp": "mlp_post_norm" if layer.mlp_post_norm else "mlp",
    }
    parts = {name: _Scaled(getattr(layer, name), factor) for name in last.values()}
    return dataclasses.replace(layer, **parts)


def model_of(decoder, **settings):
    """A `LayerSkipModel` around a decoder, which has no files and no tokenizer."""
    return LayerSkipModel(
        Checkpoint(
            path=None, decoder=decoder, tokenizer=None, settings=CheckpointSettings(**settings)
        )
    )


def counted(monkeypatch):
    """The contexts that costs of drafting are made for from now on."""
    contexts, made = [], DraftCosts.of

    def of(cls, *given):
        contexts.append(given[4])
        return made(*given)

    monkeypatch.setattr(DraftCosts, "of", classmethod(of))
    return contexts


def random_prompt(decoder, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(decoder.architecture.vocab_size, (length,), generator=generator).tolist()


def speculative(exit_layer, draft_tokens, **more):
    return Plan(mode="self-speculative", exit_layer=exit_layer, draft_tokens=draft_tokens, **more)


PLAIN = Plan(mode="plain")
ALL_DRAFTS = speculative(
    exit_layer=2,
    draft_tokens=6,
    draft_from="both",
    adaptive=True,
    draft_vocabulary=tuple(range(60)),
    trained=True,
)


def steps(decoder, prompt, plan, n=24, sampling=GREEDY, **options):
    """All steps of one generation."""
    options = {"max_new_tokens": n, "sampling": sampling, **options}
    return list(generate(decoder, prompt, plan=plan, **options))


def ids(decoder, prompt, plan, n=24, sampling=GREEDY, **options):
    """The new token ids of one generation."""
    made = steps(decoder, prompt, plan, n, sampling, **options)
    return [token for step in made for token in step.tokens]
