"""The order of the rows of Q and K: transformers' halves, or the neighbours of some GGUF files."""

from typing import Literal

from torch import Tensor

from layerskip.model import rotary
from layerskip.model.checkpoint import Files


def read(files: Files, name: str, order: Literal["halves", "interleaved"]) -> Tensor:
    """A tensor of a checkpoint, its rows in the order that is asked for where it is one of Q or K."""
    tensors, head_dim = files.tensors, files.architecture.head_dim
    tensor = tensors.read(name)
    if tensors.rotary_layout == order or name.rsplit(".", 2)[-2] not in ("q_proj", "k_proj"):
        return tensor
    if order == "interleaved":
        return rotary.interleave(tensor, head_dim, head_dim)
    return _separate(tensor, head_dim)


def _separate(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `rotary.interleave`: neighbours (2i, 2i+1) to halves (i, i + head_dim/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
