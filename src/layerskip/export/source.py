"""The checkpoint that is exported, whole or up to an exit layer."""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from layerskip.model import (
    Architecture,
    CheckpointError,
    Files,
    UnsupportedModelError,
    open_files,
    resolve,
)
from layerskip.model.architecture import Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint; with an exit layer E, its first E layers, final norm and head."""

    files: Files
    exit_layer: int | None = None

    @property
    def architecture(self) -> Architecture:
        """The source's architecture, with as many layers as are exported."""
        whole = self.files.architecture
        if self.exit_layer is None:
            return whole
        return dataclasses.replace(
            whole,
            n_layers=self.exit_layer,
            sliding_windows=whole.sliding_windows[: self.exit_layer],
            ropes=whole.ropes[: self.exit_layer],
        )

    @property
    def rope(self) -> Rope:
        """The rotary embedding, which is one for all layers in the families that are exported."""
        rope = self.files.architecture.ropes[0]
        assert rope is not None
        return rope

    @property
    def names(self) -> list[str]:
        """The tensors to export: embedding, layers one after the other, final norm, head.

        Raises:
            CheckpointError: layers do not hold the same tensors.
        """
        layers: dict[int, list[str]] = {}
        first: list[str] = []
        last: list[str] = []
        for name in sorted(self.files.names()):
            if match := _LAYER.fullmatch(name):
                layers.setdefault(int(match[1]), []).append(match[2])
            elif name == "model.embed_tokens.weight":
                first.append(name)
            else:
                last.insert(0, name)
        n_layers = self.architecture.n_layers
        if max(layers, default=-1) >= self.files.architecture.n_layers:
            raise CheckpointError(
                f"the checkpoint has layer {max(layers)}, its configuration"
                f" {self.files.architecture.n_layers} layers; fetch or save it again"
            )
        for number in range(n_layers):
            if odd := set(layers.get(number, [])) ^ set(layers.get(0, [])):
                raise CheckpointError(
                    f"layer {number} and layer 0 differ in the tensor {min(odd)};"
                    " fetch or save the checkpoint again"
                )
        inner = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in layers[i]]
        return [*first, *inner, *last]


def open_source(model: str | Path, exit_layer: int | None = None) -> Source:
    """Open a checkpoint for export, without reading its weights.

    Args:
        model: a folder, a GGUF file, a built-in alias, or a hub id.
        exit_layer: E, to export a draft model of the first E layers, 1 ... L.

    Raises:
        ValueError: it cannot be found or read, is not supported (it is named), or has no such exit.
    """
    files = open_files(resolve(str(model)))
    family, n_layers = files.architecture.family, files.architecture.n_layers
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{family} models cannot be exported; these can: {', '.join(FAMILIES)}"
        )
    if exit_layer is not None and not 1 <= exit_layer <= n_layers:
        raise ValueError(f"the exit layer is {exit_layer}, this model has exits 1 to {n_layers}")
    return Source(files=files, exit_layer=exit_layer)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype.

    Raises:
        ValueError: a number is larger than the dtype holds (65504 in float16) and would be infinite.
    """
    other = tensor.to(dtype)
    if dtype is torch.float16 and not torch.equal(other.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has numbers that float16 does not hold; choose bf16 instead")
    return other
