"""The format of a difference: what training changed in a checkpoint, in 1, 2 or 4 bits a weight.

One safetensors file. For a matrix NAME it holds `NAME.codes1`, `NAME.codes` (of 2 bits) or
`NAME.codes4`, and `NAME.scales` (see `encode`), for any other tensor NAME the difference itself in
float32; a head that is the embedding is not there a second time. The file's metadata is the `Header`.

A general compressor would take hardly a twentieth off: codes come up about equally often.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.files.json_files import CheckpointError

BITS = 2  # of a weight, unless told otherwise
BLOCK = 64  # weights of a row that share a scale
# Bits -> the best levels of a Gaussian of variance 1 (Lloyd-Max): these, and these below zero.
LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
FORMAT, VERSION = "layerskip-difference", "1"
_CODES = {1: "codes1", 2: "codes", 4: "codes4"}
_ROWS_IN_CACHE = 256  # at a time
_WEIGHTS_AT_ONCE = 2**25  # on a GPU
_ROUNDS = 3  # of choosing codes for a scale, and the best scale for those codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a difference says about itself.

    Attributes:
        base: what the base is called.
        base_sha256: of its files with weights, see `digest.sha256_of`.
        config: `config.json` of the checkpoint that base and difference make.
        generation_config: its `generation_config.json`.
    """

    base: str
    base_sha256: str
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """For the file: every field as a text, beside format and version."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
        return {"format": FORMAT, "version": VERSION, **texts}

    @classmethod
    def from_metadata(cls, texts: dict[str, str] | None, path: Path) -> "Header":
        """What `to_metadata` gave, read from the file at `path`.

        Raises:
            CheckpointError: it is no difference, or one of another version.
        """
        texts = texts or {}
        if texts.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no difference of `layerskip export --to difference`")
        if texts.get("version") != VERSION:
            raise CheckpointError(
                f"{path} is a difference of version {texts.get('version')}, and this layerskip reads"
                f" version {VERSION}; install a newer one"
            )
        try:
            return cls(
                base=texts["base"],
                base_sha256=texts["base_sha256"],
                config=_json_object(texts["config"]),
                generation_config=_json_object(texts["generation_config"]),
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error})") from error


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def layout(
    name: str, shape: tuple[int, ...], bits: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The file's tensors for one of the model's, as name -> dtype and shape.

    A matrix of [out, in] takes out * (ceil(in * bits / 8) + 2 * ceil(in / 64)) bytes.
    """
    if len(shape) != 2:
        return {name: (torch.float32, shape)}
    n_out, n_in = shape
    return {
        f"{name}.{_CODES[bits]}": (torch.uint8, (n_out, -(-n_in * bits // 8))),
        f"{name}.scales": (torch.float16, (n_out, -(-n_in // BLOCK))),
    }


def to_stored(name: str, change: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of `layout` for the difference of one of the model's tensors."""
    tensors = encode(change.float(), bits) if change.ndim == 2 else (change.float(),)
    return dict(zip(layout(name, tuple(change.shape), bits), tensors, strict=True))


def from_stored(shape: tuple[int, ...], stored: list[Tensor], bits: int) -> Tensor:
    """The difference of a tensor of this shape, in float32, from what `to_stored` gave, in its order."""
    if len(shape) != 2:
        return stored[0]
    codes, scales = stored
    return decode(codes, scales, shape[1], bits)


def bits_stored(name: str, names: Collection[str]) -> int:
    """The bits that a file with these tensors has for one of the model's; of no matter for others."""
    return next((bits for bits in LEVELS if f"{name}.{_CODES[bits]}" in names), BITS)


def encode(change: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to 2 ** bits levels a block.

    `BLOCK` neighbours of a row share a scale; the last block of a row is shorter where the row is no
    multiple. Codes count the levels, times the scale, from the lowest on; a block that did not change
    has the scale 0, and stays as it was exactly.

    Args:
        change: [out, in] float32.
        bits: 1, 2 or 4.

    Returns:
        codes [out, ceil(in * bits / 8)] uint8, the first in the lowest bits of a byte, what is left
        over in a row's last byte meaning nothing; and scales [out, ceil(in / 64)] float16.
    """
    n_in = change.shape[1]
    inside = _blocks(torch.ones(1, n_in, device=change.device))  # 0 behind the end of a row
    half = len(LEVELS[bits])
    n_bytes, in_byte = -(-n_in * bits // 8), 8 // bits
    packed, scales = [], []
    for rows in change.split(_ROWS_IN_CACHE):
        blocks = _blocks(rows)
        scales.append(_scales(blocks, inside, bits))
        rank = _rank(blocks, scales[-1].float(), bits)
        codes = torch.where(blocks < 0, half - 1 - rank, half + rank).to(torch.uint8)
        of_byte = codes.flatten(1)[:, : n_bytes * in_byte].unflatten(1, (n_bytes, in_byte))
        packed.append(torch.zeros(len(rows), n_bytes, dtype=torch.uint8, device=codes.device))
        for place in range(in_byte):
            packed[-1] |= of_byte[..., place] << bits * place
    return torch.cat(packed), torch.cat(scales)


def decode(codes: Tensor, scales: Tensor, n_in: int, bits: int) -> Tensor:
    """The numbers that codes and scales of `encode` stand for, [out, in] float32."""
    place = codes.device
    above = _levels(bits, place)
    shifts = torch.arange(0, 8, bits, device=place)
    every_byte = torch.arange(256, device=place)[:, None] >> shifts & 2**bits - 1  # its codes
    levels = torch.cat([-above.flip(0), above])[every_byte]
    of_row = levels[codes.int()].flatten(1)[:, :n_in]
    return scales.float().repeat_interleave(BLOCK, dim=1)[:, :n_in].mul_(of_row)


def rounded(change: Tensor, bits: int) -> Tensor:
    """What `decode` gives of what `encode` makes of a matrix: [out, in] float32, on its device."""
    n_in = change.shape[1]
    inside = _blocks(torch.ones(1, n_in, device=change.device))
    parts = []
    # On a GPU every piece costs launches, and nothing has to stay in a cache.
    n_rows = _ROWS_IN_CACHE if change.device.type == "cpu" else max(1, _WEIGHTS_AT_ONCE // n_in)
    for rows in change.float().split(n_rows):
        blocks = _blocks(rows)
        scales = _scales(blocks, inside, bits).float()
        parts.append(_nearest(blocks, scales, bits).flatten(1)[:, :n_in])
    return torch.cat(parts)


def scales_of(block: Tensor, bits: int) -> Tensor:
    """The scales that `encode` gives the rows of a block [out, n], in float32 [out]."""
    return _scales(block, torch.ones(1, block.shape[1], device=block.device), bits).float()


def nearest(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What `encode` makes of values, one in a row, in blocks of these scales: both [out] float32."""
    return _nearest(values[:, None], scales, bits)[:, 0]


def _nearest(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Blocks [..., n] on the levels of their scales [...]."""
    levels = _magnitudes(blocks, scales, bits)
    return torch.where(blocks < 0, -levels, levels) * scales[..., None]


def _scales(blocks: Tensor, inside: Tensor, bits: int) -> Tensor:
    """A scale for each block [..., n], [...] float16; `inside` is 1 where there is a weight, else 0."""
    scales = (blocks.square().sum(-1) / inside.sum(-1)).sqrt()
    for _ in range(_ROUNDS):
        levels = _magnitudes(blocks, scales, bits) * inside
        scales = (blocks.abs() * levels).sum(-1) / levels.square().sum(-1)  # least squares
    return scales.to(torch.float16)


def _blocks(rows: Tensor) -> Tensor:
    """[out, in] to [out, ceil(in / 64), 64], with zeros behind the end of a row."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _rank(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Which magnitude is nearest, counted from the least."""
    sizes = blocks.abs()
    rank = torch.zeros_like(blocks, dtype=torch.int64)
    for less, more in itertools.pairwise(LEVELS[bits]):
        rank += sizes > (less + more) / 2 * scales[..., None]
    return rank


def _magnitudes(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    return _levels(bits, blocks.device)[_rank(blocks, scales, bits)]


@functools.cache
def _levels(bits: int, place: torch.device) -> Tensor:
    """The levels above zero, on a device once."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.tensor(LEVELS[bits], dtype=torch.float32, device=place)
