"""A tiny base, a checkpoint trained from it, and the weight delta between them."""

import json

import gguf_files
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
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


def write(file, base_folder, trained_folder):
    """Write trained minus base weights as the package's delta of 2 bits: each to its nearest level."""
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base_folder, trained_folder)
    )
    tensors = {}
    for name, weight in after.items():
        change = weight.float() - before[name].float()
        if change.ndim == 2:
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = encode(change)
        else:
            tensors[name] = change
    config = json.loads((trained_folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    settings = (trained_folder / "generation_config.json").read_text()
    metadata = {"config": json.dumps(config), "generation_config": settings}
    save_file(tensors, file, metadata=metadata)


def encode(change):
    """Codes and scales of a matrix [out, in]; a scale is the root mean square of 64 neighbours."""
    n_in = change.shape[1]
    blocks = change.split(64, dim=1)
    scales = torch.stack([block.square().mean(1).sqrt() for block in blocks], dim=1).half()
    of_weight = scales.float().repeat_interleave(64, dim=1)[:, :n_in]
    codes = (change > -0.9814 * of_weight).byte() + (change > 0) + (change > 0.9814 * of_weight)
    codes = pad(codes, (0, -n_in % 4)).unflatten(1, (-1, 4))
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return packed, scales


def weights(folder):
    """transformers' reading of a checkpoint in float32, without the tied head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())
