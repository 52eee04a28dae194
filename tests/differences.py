"""A tiny base, what training made of it, and a tensor's way back from a difference."""

import json

import gguf_files
import torch
from transformers import AutoModelForCausalLM

import tiny_checkpoint
import tiny_models

CHANGE = 0.02  # standard deviation, against weights of 0.15
SETTINGS = {
    "assistant_early_exit": 2,
    "num_assistant_tokens": 3,
    "layerskip": {"draft_vocabulary": "5 6 7", "weights": {"int4": {"method": "calibration"}}},
}


def base(folder, case="smollm2"):
    """A checkpoint with a tokenizer; smollm2's head is tied, and its rows end in shorter blocks."""
    tiny_checkpoint.save(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    tiny_models.build(case, vocab_size=size).save_pretrained(folder)
    return folder


def gguf_base(file, plain_folder):
    """A GGUF file with a tokenizer in it, and the weights it stands for as transformers has them."""
    model = tiny_models.build("llama2", vocab_size=270, head_dim=16)
    model.load_state_dict(
        gguf_files.write(file, model, kind=gguf_files.KINDS[-1], tokenizer="smollm")
    )
    model.save_pretrained(plain_folder)


def trained(base_folder, folder, change=CHANGE):
    """The same with every weight moved a little, and with settings."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += change * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    file = folder / "generation_config.json"
    fields = json.loads(file.read_text()) | SETTINGS
    del fields["_from_model_config"]  # with it transformers leaves out what it does not know
    file.write_text(json.dumps(fields))
    return folder


def weights(folder):
    """transformers' reading of a checkpoint in float32, without the tied head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())
