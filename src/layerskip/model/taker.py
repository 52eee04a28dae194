"""Takes tensors out of a checkpoint: checked, cast, fused, and packed for the machine."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.embedding import DenseEmbedding, Embedding, QuantizedEmbedding
from layerskip.model.files.json_files import CheckpointError
from layerskip.model.files.weights import Tensors, missing
from layerskip.model.large_pages import LargePages
from layerskip.model.linear import Linear, Matrix, QuantizedLinear, linear
from layerskip.model.native import PanelEmbedding, PanelMatrix
from layerskip.model.packed import pack
from layerskip.model.quantize import EMBEDDING_BITS, GROUP, Quantized, bits_of, quantize, stack

Change = Callable[[Tensor], Tensor]
"""What is done to a tensor's rows before it is cast."""
_ROUNDED_WEIGHTS = 2**19  # at a time: rounding needs several float32 copies


class Taker:
    """Reads tensors, checks their shapes, and remembers which were used.

    Args:
        tensors: the checkpoint.
        ignored: ends of names that need no use.
        dtype: of what is not quantized.
        device: of everything.
        weights: how matrices are kept, a key of `quantize.WEIGHTS`.
        in_panels: they are laid out for the kernels of `native`.
    """

    def __init__(
        self,
        tensors: Tensors,
        ignored: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
        weights: str,
        *,
        in_panels: bool = False,
    ) -> None:
        self._pages = LargePages() if in_panels else None
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._bits = bits_of(weights)
        self._names = tensors.names()
        self._unused = {n for n in self._names if not n.endswith(ignored)}
        self._in_some_layer = {_without_number(n) for n in self._names}
        self.rotary_layout = tensors.rotary_layout

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        change: Change | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The tensor, which has to be there, in the decoder's dtype or another."""
        if change is None:
            return self._cast(self._needed(name, shape, dtype or self._dtype), dtype)
        return self._cast(change(self._needed(name, shape)), dtype)

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        """The token embedding, [V, D]."""
        weight = self._vocabulary(name, shape)
        if self._pages is not None:
            return PanelEmbedding(PanelMatrix(weight, pages=self._pages))
        if isinstance(weight, Quantized):
            return QuantizedEmbedding(pack(weight, self._device), self._dtype)
        return DenseEmbedding(weight)

    def head(self, name: str, shape: tuple[int, int], *, tied: bool) -> Matrix | None:
        """The LM head, or None where the checkpoint has none but the embedding."""
        if tied or name not in self._names:
            self._unused.discard(name)
            return None
        return self._product(self._vocabulary(name, shape), None)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        n_in: int,
        *,
        arranged: Change | None = None,
        scales: Sequence[float] = (),
        is_quantized: bool = True,
    ) -> Linear:
        """Projections of one input as one product: a name for each, or one that holds them all.

        Args:
            names: of the projections.
            rows: outputs of each part of the product.
            n_in: inputs.
            arranged: puts the rows of all parts, one after the other, into another order.
            scales: what the weights and biases of each part are multiplied by; none: nothing.
            is_quantized: False keeps the weight in the decoder's dtype in any case.
        """
        sizes = rows if len(names) == len(rows) else [sum(rows)]
        parts = [(f"{name}.weight", (size, n_in)) for name, size in zip(names, sizes, strict=True)]

        is_scaled = any(scale != 1.0 for scale in scales)

        def ordered(stacked: Tensor) -> Tensor:
            if arranged is None:
                return stacked
            # Their numbers are put into order, not the rows themselves: each is copied once.
            return stacked[arranged(torch.arange(sum(rows))).to(stacked.device)]

        def finished(tensors: list[Tensor]) -> Tensor:
            if not is_scaled:
                return ordered(_stacked([self._cast(tensor) for tensor in tensors]))
            return _multiplied(ordered(_stacked(tensors)), rows, scales)

        biases = self._biases(names, sizes)
        bias = self._cast(finished(biases)) if biases else None
        if self._bits is None or not is_quantized:
            dtype = None if is_scaled else self._dtype  # at once: what is stored may be larger
            weight = self._cast(finished([self._needed(*part, dtype) for part in parts]))
            return self._product(weight, bias)
        if is_scaled:  # off the grid that a file may have
            values = finished([self._needed(*part) for part in parts])
            return self._product(self._rounded(parts[0][0], values, self._bits), bias)
        codes = stack([self._quantized(*part, self._bits) for part in parts])
        return self._product(codes if arranged is None else codes.by_rows(ordered), bias)

    def finish(self) -> None:
        """Refuse tensors that were not used."""
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            raise UnsupportedModelError(
                f"the checkpoint holds {len(self._unused)} tensors that its family does not use"
                f" ({some}); it needs a family of its own"
            )

    def _biases(self, names: Sequence[str], sizes: Sequence[int]) -> list[Tensor]:
        """One for each name, or none at all."""
        biases = [
            self._raw(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)
        ]
        present = [bias for bias in biases if bias is not None]
        if len(present) not in (0, len(names)):
            raise CheckpointError(f"only some of {list(names)} have a bias")
        return present

    def _product(self, weight: Tensor | Quantized, bias: Tensor | None) -> Matrix:
        """A finished matrix, laid out for the machine."""
        if self._pages is not None:
            return PanelMatrix(weight, bias, self._pages)
        if isinstance(weight, Quantized):
            return QuantizedLinear(pack(weight, self._device), bias, self._dtype)
        return linear(weight, bias)

    def _vocabulary(self, name: str, shape: tuple[int, int]) -> Tensor | Quantized:
        if self._bits is None:
            return self(name, shape)
        return self._quantized(name, shape, EMBEDDING_BITS)

    def _quantized(self, name: str, shape: tuple[int, int], bits: int) -> Quantized:
        """A matrix as it is stored, where that is on the grid of these bits; else rounded to it."""
        if not self._is_there(name):
            raise missing(name)
        stored = self._tensors.quantized(name)
        if stored is not None and stored.offsets is None and (stored.bits, bits) == (4, 8):
            stored = stored.in_8_bits()
        if stored is None or stored.bits != bits:
            return self._rounded(name, self._needed(name, shape), bits)
        self._check(name, stored.shape, shape)
        return stored

    def _rounded(self, name: str, weight: Tensor, bits: int) -> Quantized:
        """Quantized, some rows at a time."""
        if weight.shape[1] % GROUP:
            raise UnsupportedModelError(
                f"{name} has rows of {weight.shape[1]} weights, which cannot be cut into groups of"
                f" {GROUP} for {bits} bits; load the model with 16bit weights"
            )
        n_rows = max(1, _ROUNDED_WEIGHTS // weight.shape[1])
        return stack([quantize(some, bits) for some in weight.split(n_rows)])

    def _needed(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        tensor = self._raw(name, shape, dtype)
        if tensor is None:
            raise missing(name)
        return tensor

    def _raw(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor | None:
        if not self._is_there(name):
            return None
        tensor = self._tensors.read(name, dtype)
        self._check(name, tensor.shape, shape)
        return tensor

    def _is_there(self, name: str) -> bool:
        """Whether there is such a tensor, which now has a use; other layers must not have one alone."""
        if name not in self._names:
            if _without_number(name) in self._in_some_layer:
                raise missing(name)
            return False
        self._unused.discard(name)
        return True

    def _check(self, name: str, found: Sequence[int], shape: Sequence[int]) -> None:
        if tuple(found) != tuple(shape):
            raise CheckpointError(
                f"{name} has the shape {tuple(found)}, the config says {tuple(shape)}"
            )

    def _cast(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self._device, dtype=dtype or self._dtype)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _multiplied(stacked: Tensor, rows: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Each part by its scale, in float32, so that it is rounded once."""
    parts = zip(stacked.split(list(rows)), scales, strict=True)
    return torch.cat([part if scale == 1.0 else part.float() * scale for part, scale in parts])


def _without_number(name: str) -> str:
    return re.sub(r"(?<=\.layers\.)\d+", "", name)
