"""Tiny checkpoints on disk, and what our decoder and transformers make of a folder or file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from exit_states import exit_states
from layerskip.model import load


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The checkpoint folder of a case of `tiny_models`, saved once; do not change it."""
    folders = {}

    def folder(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp(case)
            tiny_models.reference(case).save_pretrained(folders[case])
        return folders[case]

    return folder


@pytest.fixture
def ours():
    """Our decoder's float32 logits [T, V] of a checkpoint, of all layers or at an exit."""

    def logits(path, tokens, exit_layer=None):
        decoder = load(path, dtype=torch.float32).decoder
        exit_layer = exit_layer or len(decoder.layers)
        states = exit_states(decoder, tokens.tolist(), [exit_layer])
        return decoder.logits(states[exit_layer])[0]

    return logits


@pytest.fixture
def theirs():
    """transformers' float32 logits [T, V] of a checkpoint folder, or of a GGUF file."""

    def logits(path, tokens):
        if path.is_dir():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
        with torch.no_grad():
            return model(tokens[None], use_cache=False).logits[0]

    return logits
