"""Named tensors to a decoder: read, checked, fused, and what can be is folded into the weights.

Folded are the offset of norms with (1 + w), the scale of attention (into the queries' norm or rows),
the scale of the residual (into what is added) and that of the logits (into the final norm), so that
families which have none of them pay nothing.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.fileio import CheckpointError
from layerskip.model import decoder as rotary
from layerskip.model import native, torch_compile
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.decoder import (
    MLP,
    Decoder,
    DenseEmbedding,
    Embedding,
    Experts,
    HeadNorm,
    Layer,
    LayerNorm,
    Norm,
    ProjectionNorm,
    QuantizedEmbedding,
    RMSNorm,
)
from layerskip.model.families import FAMILIES
from layerskip.model.hardware import has_fast_bfloat16, leave_out_cudnn_attention
from layerskip.model.native import PackedEmbedding, PackedMatrix
from layerskip.model.native.packed import LargePages
from layerskip.model.quantize import (
    EMBEDDING_BITS,
    GROUP,
    Linear,
    Matrix,
    Quantized,
    QuantizedLinear,
    bits_of,
    linear,
    pack,
    quantize,
    stack,
)
from layerskip.model.weights import Tensors, missing

Change = Callable[[Tensor], Tensor]
"""What is done to a tensor's rows before it is cast."""
_ROUNDED_WEIGHTS = 2**19  # at a time: rounding needs several float32 copies


class WeightLoader:
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
            return PackedEmbedding(PackedMatrix(weight, pages=self._pages))
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
            return PackedMatrix(weight, bias, self._pages)
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


def build(
    architecture: Architecture,
    tensors: Tensors,
    *,
    tied: bool = False,
    dtype: torch.dtype,
    device: torch.device | str,
    weights: str = "16bit",
    compiled: bool = False,
) -> Decoder:
    """Read, cast or quantize, fuse and pack every weight, one layer at a time.

    With int8 or int4 weights, the layers' matrices have these bits, embedding and head have 8; norms,
    biases and the routers of mixtures stay in `dtype`, norms of 1 + w in float32. What a GGUF file
    holds in these very bits is taken over; where rows are scaled, it is rounded once more. `tied` says
    that the head is the embedding, though there may be a copy under its own name. `compiled` asks for
    the kernels of `native`, or on a GPU for `torch.compile`, where they support the architecture.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the architecture says.
        UnsupportedModelError: the checkpoint holds tensors that the decoder has no use for, or rows
            that cannot be quantized.
        ValueError: `weights` is none of `quantize.WEIGHTS`.
    """
    a = architecture
    names = FAMILIES[a.family].names
    place = torch.device(device)
    leave_out_cudnn_attention(place)
    kind: type[Decoder] = Decoder
    if compiled and native.supports(a, dtype, place):
        kind = native.NativeDecoder
    elif compiled and torch_compile.supports(a, place):
        kind = torch_compile.CompiledDecoder
    take = WeightLoader(
        tensors, names.ignored, dtype, place, weights, in_panels=kind is native.NativeDecoder
    )
    vocabulary = a.vocab_size, a.hidden_size
    embedding = take.embedding(f"{names.embedding}.weight", vocabulary)
    layers = [_LayerBuilder(a, take, i).build() for i in range(a.n_layers)]
    final_norm = _norm(a, take, names.final_norm, scale=a.logit_scale)
    head = take.head(f"{names.head}.weight", vocabulary, tied=tied)
    take.finish()
    return kind(
        a,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        dtype=dtype,
        device=place,
        weights=weights,
    )


def fast_dtype(
    architecture: Architecture, device: torch.device, compiled: bool = False
) -> torch.dtype:
    """bfloat16 on a GPU, on a CPU with AVX-512, and wherever `build` would take the compiled kernels,
    which read such weights at the speed of memory; else float32, as PyTorch is slow with it there.
    A GPU that has no bfloat16 takes float16.
    """
    dtype = torch.bfloat16
    if has_fast_bfloat16(device) or (compiled and native.supports(architecture, dtype, device)):
        return dtype
    return torch.float16 if device.type == "cuda" else torch.float32


def _scaled(factor: float) -> Change | None:
    """Multiplication in float32, so that it is rounded once."""
    return None if factor == 1.0 else lambda tensor: tensor.float() * factor


def _norm(a: Architecture, take: WeightLoader, name: str, scale: float = 1.0) -> Norm:
    weight = _norm_weight(a, take, name, a.hidden_size, scale)
    if not FAMILIES[a.family].norm_bias:
        return RMSNorm(weight, a.norm_eps)
    return LayerNorm(weight, take(f"{name}.bias", (a.hidden_size,), _scaled(scale)), a.norm_eps)


def _norm_weight(a: Architecture, take: WeightLoader, name: str, size: int, scale: float) -> Tensor:
    """[size]; of 1 + w in float32, as transformers has it: w is small, 16 bits would round it away."""
    offset = FAMILIES[a.family].norm_offset
    if offset == 0.0:
        return take(f"{name}.weight", (size,), _scaled(scale))
    return take(
        f"{name}.weight", (size,), lambda weight: (weight.float() + offset) * scale, torch.float32
    )


class _LayerBuilder:
    """Takes the parts of one layer."""

    def __init__(self, a: Architecture, take: WeightLoader, index: int) -> None:
        self.a, self.take, self.index = a, take, index
        self.family = FAMILIES[a.family]
        self.names = self.family.names
        self.prefix = self.names.layer.format(index)
        self.n_queries, self.n_keys = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.query_scale = 1.0  # attention divides by sqrt(head_dim)
        if a.attention_scale is not None:
            self.query_scale = a.attention_scale * math.sqrt(a.head_dim)

    def build(self) -> Layer:
        names, qk_norm = self.names, self._qk_norm()
        return Layer(
            attention_norm=self._norm(names.attention_norm),
            qkv=self._qkv(1.0 if qk_norm else self.query_scale),
            qk_norm=qk_norm,
            attention_out=self._added(names.attention_out, self.n_queries),
            attention_post_norm=self._norm(names.attention_post_norm),
            mlp_norm=self._norm(names.mlp_norm),
            mlp=self._mlp(),
            mlp_post_norm=self._norm(names.mlp_post_norm),
        )

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else _norm(self.a, self.take, self.prefix + name)

    def _linear(self, names: Sequence[str], rows: Sequence[int], n_in: int, **how: Any) -> Linear:
        """See `WeightLoader.linear`; names without the layer's part."""
        return self.take.linear([self.prefix + name for name in names], rows, n_in, **how)

    def _added(self, name: str, n_in: int) -> Linear:
        """A product that is added to the hidden states."""
        a = self.a
        return self._linear([name], [a.hidden_size], n_in, scales=[a.residual_scale])

    def _qkv(self, query_scale: float) -> Linear:
        def arranged(rows: Tensor) -> Tensor:
            if self.family.qkv_by_head:
                by_head = rows.view(self.a.n_heads, 3, self.a.head_dim, *rows.shape[1:])
                rows = by_head.transpose(0, 1).reshape(rows.shape)
            queries, keys, values = rows.split([self.n_queries, self.n_keys, self.n_keys])
            return torch.cat([self._turnable(queries), self._turnable(keys), values])

        rows = self.n_queries, self.n_keys, self.n_keys
        scales = query_scale, 1.0, 1.0
        return self._linear(
            self.names.qkv, rows, self.a.hidden_size, arranged=arranged, scales=scales
        )

    def _turnable(self, rows: Tensor) -> Tensor:
        """Rows of Q, K or their norms with rotary pairs side by side."""
        rope, head_dim = self.a.ropes[self.index], self.a.head_dim
        if self.take.rotary_layout == "interleaved":
            return rows
        return rotary.interleave(rows, head_dim, rope.turned(head_dim) if rope else head_dim)

    def _qk_norm(self) -> Norm | None:
        a, hd = self.a, self.a.head_dim
        if self.family.qk_norm is None:
            return None
        is_by_head = self.family.qk_norm == "head"

        def weight_of(name: str, size: int, scale: float = 1.0) -> Tensor:
            size = hd if is_by_head else size
            return self._turnable(_norm_weight(a, self.take, self.prefix + name, size, scale))

        queries = weight_of(self.names.query_norm, self.n_queries, self.query_scale)
        keys = weight_of(self.names.key_norm, self.n_keys)
        if not is_by_head:
            return ProjectionNorm(queries, keys, a.norm_eps)
        weight = torch.cat([queries.expand(a.n_heads, hd), keys.expand(a.n_kv_heads, hd)])
        return HeadNorm(weight, a.norm_eps)

    def _mlp(self) -> Linear:
        a, names, mixture = self.a, self.names, self.a.mixture
        if mixture is None or self.index not in mixture.layers:
            return self._one_mlp(names.gate_up, names.down, a.ffn_size)
        experts = []
        for number in range(mixture.n_experts):
            prefix = names.expert.format(number)
            gate_up = [prefix + name for name in names.expert_gate_up]
            experts.append(self._one_mlp(gate_up, prefix + names.expert_down, mixture.ffn_size))
        router = self._linear(
            [names.router], [mixture.n_experts], a.hidden_size, is_quantized=False
        )
        return Experts(router, experts, mixture.top_k, mixture.normalized)

    def _one_mlp(self, inputs: Sequence[str], output: str, width: int) -> Linear:
        """A gated or plain MLP of a width; `inputs` and `output` are names of its projections."""
        a, is_gated = self.a, self.family.is_gated
        down = self._added(output, width)
        gate_up = self._linear(inputs, [width, width] if is_gated else [width], a.hidden_size)
        return MLP(gate_up, down, a.activation, is_gated=is_gated)
