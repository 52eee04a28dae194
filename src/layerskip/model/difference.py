"""The format of a difference: what training changed in a checkpoint, in 2 bits a weight.

One safetensors file. For a matrix NAME it holds `NAME.codes` and `NAME.scales` (see `encode`), for any
other tensor NAME the difference itself in float32; a head that is the embedding is not there a second
time. The file's metadata is the `Header`.

A general compressor would take hardly a twentieth off: the four codes come up about equally often.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from layerskip.model.weights import CheckpointError

BLOCK = 64  # weights of a row that share a scale
NEAR, FAR = (
    0.4528,
    1.510,
)  # the four best levels of a Gaussian of variance 1 (Lloyd-Max): these and -these
FORMAT, VERSION = "layerskip-difference", "1"
_CODES_IN_BYTE = 4
_ROWS_IN_CACHE = 256  # at a time
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


def layout(name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The file's tensors for one of the model's, as name -> dtype and shape.

    A matrix of [out, in] takes out * (ceil(in / 4) + 2 * ceil(in / 64)) bytes.
    """
    if len(shape) != 2:
        return {name: (torch.float32, shape)}
    n_out, n_in = shape
    return {
        f"{name}.codes": (torch.uint8, (n_out, -(-n_in // _CODES_IN_BYTE))),
        f"{name}.scales": (torch.float16, (n_out, -(-n_in // BLOCK))),
    }


def to_stored(name: str, change: Tensor) -> dict[str, Tensor]:
    """The tensors of `layout` for the difference of one of the model's tensors."""
    tensors = encode(change.float()) if change.ndim == 2 else (change.float(),)
    return dict(zip(layout(name, tuple(change.shape)), tensors, strict=True))


def from_stored(shape: tuple[int, ...], stored: list[Tensor]) -> Tensor:
    """The difference of a tensor of this shape, in float32, from what `to_stored` gave, in its order."""
    if len(shape) != 2:
        return stored[0]
    codes, scales = stored
    return decode(codes, scales, shape[1])


def encode(change: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to four levels a block.

    `BLOCK` neighbours of a row share a scale; the last block of a row is shorter where the row is no
    multiple. Code 0 stands for -FAR, 1 for -NEAR, 2 for NEAR and 3 for FAR times the scale; a block
    that did not change has the scale 0, and stays as it was exactly.

    Args:
        change: [out, in] float32.

    Returns:
        codes [out, ceil(in / 4)] uint8, the first of four in the lowest bits of a byte, what is left
        over in a row's last byte meaning nothing; and scales [out, ceil(in / 64)] float16.
    """
    n_out, n_in = change.shape
    blocks = _blocks(change)
    scales = _scales(blocks, _blocks(torch.ones(1, n_in)))  # 0 behind the end of a row
    is_far = _is_far(blocks, scales.float())
    codes = torch.where(blocks < 0, 1 - is_far.to(torch.uint8), 2 + is_far.to(torch.uint8))
    n_bytes = -(-n_in // _CODES_IN_BYTE)
    fours = codes.flatten(1)[:, : n_bytes * _CODES_IN_BYTE].unflatten(1, (n_bytes, _CODES_IN_BYTE))
    packed = torch.zeros(n_out, n_bytes, dtype=torch.uint8)
    for place in range(_CODES_IN_BYTE):
        packed |= fours[..., place] << 2 * place
    return packed, scales


def decode(codes: Tensor, scales: Tensor, n_in: int) -> Tensor:
    """The numbers that codes and scales of `encode` stand for, [out, in] float32."""
    every_byte = torch.arange(256)[:, None] >> torch.arange(0, 8, 2) & 3  # its four codes
    levels = torch.tensor([-FAR, -NEAR, NEAR, FAR])[every_byte]
    fours = levels[codes.int()].flatten(1)[:, :n_in]
    values: Tensor = scales.float().repeat_interleave(BLOCK, dim=1)[:, :n_in].mul_(fours)
    return values


def rounded(change: Tensor) -> Tensor:
    """What `decode` gives of what `encode` makes of a matrix: [out, in] float32, on its device."""
    n_in = change.shape[1]
    inside = _blocks(torch.ones(1, n_in, device=change.device))
    parts = []
    for rows in change.float().split(_ROWS_IN_CACHE):
        blocks = _blocks(rows)
        scales = _scales(blocks, inside).float()
        parts.append(_nearest(blocks, scales).flatten(1)[:, :n_in])
    return torch.cat(parts)


def scales_of(block: Tensor) -> Tensor:
    """The scales that `encode` gives the rows of a block [out, n], in float32 [out]."""
    return _scales(block, torch.ones(1, block.shape[1])).float()


def nearest(values: Tensor, scales: Tensor) -> Tensor:
    """What `encode` makes of values, one in a row, in blocks of these scales: both [out] float32."""
    return _nearest(values[:, None], scales)[:, 0]


def _nearest(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [..., n] on the levels of their scales [...]."""
    levels = _magnitudes(_is_far(blocks, scales))
    return torch.where(blocks < 0, -levels, levels) * scales[..., None]


def _scales(blocks: Tensor, inside: Tensor) -> Tensor:
    """A scale for each block [..., n], [...] float16; `inside` is 1 where there is a weight, else 0."""
    scales = (blocks.square().sum(-1) / inside.sum(-1)).sqrt()
    for _ in range(_ROUNDS):
        levels = _magnitudes(_is_far(blocks, scales)) * inside
        scales = (blocks.abs() * levels).sum(-1) / levels.square().sum(-1)  # least squares
    halves: Tensor = scales.to(torch.float16)
    return halves


def _blocks(rows: Tensor) -> Tensor:
    """[out, in] to [out, ceil(in / 64), 64], with zeros behind the end of a row."""
    padded: Tensor = F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return padded


def _is_far(blocks: Tensor, scales: Tensor) -> Tensor:
    far: Tensor = blocks.abs() > (NEAR + FAR) / 2 * scales[..., None]
    return far


def _magnitudes(is_far: Tensor) -> Tensor:
    return torch.where(is_far, FAR, NEAR)
