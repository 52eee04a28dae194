"""Makes the built-in trained checkpoint of its base and a weight delta (trained minus base weights).

The delta is one safetensors file of this package. For a matrix NAME of [out, in] it holds `NAME.codes`,
uint8 [out, ceil(in / 4)], 2 bits a weight and the first in the lowest bits of a byte, and
`NAME.scales`, float16 [out, ceil(in / 64)]. For any other tensor NAME it holds the delta itself in
float32; a tied head is left out. Its metadata has `config` and `generation_config`, as JSON.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerskip.model import row_order
from layerskip.model.checkpoint import open_files
from layerskip.model.files import older_names
from layerskip.model.files.json_files import write_json
from layerskip.model.files.writing import share_weights

BLOCK = 64  # weights of a row that share a scale
LEVELS = (-1.510, -0.4528, 0.4528, 1.510)  # of the codes, times the scale


def merge(delta_file: Path, folder: Path, base: Path) -> None:
    """Write the sums of base and delta, in bfloat16, as an ordinary transformers checkpoint.

    Args:
        delta_file: a delta to this base; the caller has checked the sha256 of both.
        folder: the folder to make.
        base: the folder of the base, which has the tokenizer.

    Raises:
        OSError: the folder cannot be written.
    """
    files = open_files(base)
    folder.mkdir()
    state: dict[str, Tensor] = {}
    with safe_open(delta_file, framework="pt") as delta:
        metadata, stored = delta.metadata(), set(delta.keys())
        config = json.loads(metadata["config"])
        write_json(folder / "config.json", config | older_names.of_config(config))
        write_json(folder / "generation_config.json", json.loads(metadata["generation_config"]))
        files.write_tokenizer(folder)
        for name in sorted(files.names()):
            before = row_order.read(files, name, "halves").float()
            if name in stored:
                change = delta.get_tensor(name)
            else:
                codes, scales = (delta.get_tensor(f"{name}.{part}") for part in ("codes", "scales"))
                change = decode(codes, scales, before.shape[1])
            state[name] = (before + change).to(torch.bfloat16)
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from error
    share_weights(folder)


def decode(codes: Tensor, scales: Tensor, n_in: int) -> Tensor:
    """Return the matrix [out, n_in], float32, that codes and scales stand for."""
    shifts = torch.arange(0, 8, 2)
    codes_of_byte = torch.arange(256)[:, None] >> shifts & 3
    levels = torch.tensor(LEVELS)[codes_of_byte]
    of_row = levels[codes.int()].flatten(1)[:, :n_in]
    return scales.float().repeat_interleave(BLOCK, dim=1)[:, :n_in].mul_(of_row)
