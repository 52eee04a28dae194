"""Random exit adapters of the tiny decoders, whose drafts are often, but not always, right."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import torch
from tiny_decoders import speculative, tiny_decoder

import tiny_models
from layerskip.adapt.network import initial_parameters
from layerskip.decoding import generate
from layerskip.model import open_files
from layerskip.model.exit_adapter import (
    AdapterSettings,
    ExitAdapterWeights,
    TensorDict,
    adapter_architecture,
)
from layerskip.model.loader import build_adapter

ADAPTER = speculative(None, 4, draft_from="exit-adapter")
EVERY_SOURCE = speculative(None, 6, draft_from="exit-adapter+n-gram", adaptive=True)


@functools.cache
def adapter_parameters(case, **changes):
    """Return parameters that begin with a copy of the last layer, and pass the state of layer E on."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.build(case, **changes).save_pretrained(folder)
        files = open_files(Path(folder))
        size = files.architecture.hidden_size
        projection = torch.cat([torch.eye(size), 0.1 * torch.eye(size)], dim=1)
        parameters = initial_parameters(files, projection, output_scale=0.1)
        return {n: t.clone() for n, t in parameters.items()}


@functools.cache
def tiny_adapter(decoder, case, exit_layer, draft_vocabulary=tuple(range(80)), **changes):
    """Return an adapter of a decoder of `tiny_decoders.tiny_decoder(case)`."""
    adapter, projection = build_adapter(
        decoder,
        adapter_architecture(decoder.architecture),
        TensorDict(adapter_parameters(case, **changes)),
        dtype=decoder.dtype,
        weights=decoder.weights,
        compiled=decoder.kernels == "compiled",
    )
    return ExitAdapterWeights(
        settings=AdapterSettings(exit_layer=exit_layer, logit_scale=1.0, base={}),
        decoder=adapter,
        projection=projection,
        draft_vocabulary=draft_vocabulary,
    )


def adapted_steps(decoder, adapter, prompt, config, n=24, *, measured=None, **options):
    """Return all steps of one generation with an adapter; options replace those of the config."""
    config = dataclasses.replace(config, max_new_tokens=n, **options)
    return list(generate(decoder, prompt, config, measured=measured, adapter=adapter))


def with_adapter(case, exit_layer, *, upper=0.1, compiled=False):
    """Return a tiny decoder and an adapter of it."""
    decoder = tiny_decoder(case, upper=upper, compiled=compiled)
    return decoder, tiny_adapter(decoder, case, exit_layer)
