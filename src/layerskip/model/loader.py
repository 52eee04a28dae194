"""Tensors to a decoder: read, check, fuse, and fold scalings into the weights.

Last step of loading (`hub` -> `checkpoint` -> `weights` -> `loader`). Afterwards all weights are in the
decoder's parts, on its device: as `DenseLinear`, `PackedLinear` or `QuantizedLinear` of `linear`, or
for the compiled kernels as `PackedMatrix` of `native.packed`. The checkpoint's files are not needed any
more.

Folded into the weights are the offset of norms with (1 + w), the scale of attention (into the queries'
norm or rows), the scale of the residual (into the projections that are added) and that of the logits
(into the final norm), so that families without them pay nothing.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.fileio import CheckpointError
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
    interleave,
)
from layerskip.model.families import FAMILIES
from layerskip.model.hardware import disable_cudnn_attention, has_fast_bfloat16
from layerskip.model.linear import ConcatLinear, Linear, Matrix, QuantizedLinear, linear
from layerskip.model.native import PackedEmbedding, PackedLinear, PackedMatrix
from layerskip.model.native.packed import LargePages
from layerskip.model.quantize import (
    EMBEDDING_BITS,
    GROUP,
    INT4_KINDS,
    STORED,
    Quantized,
    bits_of,
    concat,
    quantize,
    to_int8,
)
from layerskip.model.weights import Tensors, check_finite, missing

Transform = Callable[[Tensor], Tensor]
"""A function of a tensor's rows, applied before the cast."""
ADAPTER_PROJECTION = "exit_adapter.projection"
_CHUNK_WEIGHTS = 2**19  # quantized at a time, since that needs several float32 copies


def build(
    architecture: Architecture,
    tensors: Tensors,
    *,
    tied: bool = False,
    dtype: torch.dtype,
    device: torch.device | str,
    weights: str = "16bit",
    kv_cache: str = "auto",
    compiled: bool = False,
) -> Decoder:
    """Read, cast or quantize, fuse and pack every weight, one layer at a time.

    With "stored" weights, matrices that are quantized in a GGUF file keep their blocks. With int8 or
    int4 weights, the layers' matrices have these bits, embedding and head are int8, and blocks that have
    the same bits are kept. Norms, biases, the routers of mixtures and everything else are in `dtype`,
    norms of 1 + w in float32. Products with quantized rows that a family scales are scaled afterwards.

    Args:
        architecture: of the decoder.
        tensors: the checkpoint's.
        tied: the head is the embedding, although the file may hold a copy of it.
        dtype: of everything that is not quantized.
        device: of everything.
        weights: a key of `quantize.WEIGHTS`.
        kv_cache: one of `kv_cache.KV_CACHES`.
        compiled: use the kernels of `native`, or on a GPU `torch.compile`, if they support the
            architecture.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the architecture says.
        UnsupportedModelError: the checkpoint holds tensors that the decoder has no use for, or rows
            that cannot be quantized.
        ValueError: `weights` is none of `quantize.WEIGHTS`, or `kv_cache` is not supported.
    """
    a, device = architecture, torch.device(device)
    names = FAMILIES[a.family].names
    disable_cudnn_attention(device)
    kind: type[Decoder] = Decoder
    if compiled and native.supports(a, dtype, device):
        kind = native.NativeDecoder
    elif compiled and torch_compile.supports(a, device):
        if kv_cache != "auto":
            raise ValueError(
                f"torch.compile does not support a KV cache in {kv_cache}; load without compile"
            )
        kind = torch_compile.CompiledDecoder
    is_native = kind is native.NativeDecoder
    load = WeightLoader(tensors, names.ignored, dtype, device, weights, is_native=is_native)
    vocabulary = a.vocab_size, a.hidden_size
    embedding = load.embedding(f"{names.embedding}.weight", vocabulary)
    layers = [_LayerLoader(a, load, i).layer() for i in range(a.n_layers)]
    final_norm = _norm(a, load, names.final_norm, scale=a.logit_scale)
    head = load.head(f"{names.head}.weight", vocabulary, tied=tied)
    load.check_all_used()
    return kind(
        a,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        dtype=dtype,
        device=device,
        weights=weights,
        kv_cache=kv_cache,
    )


def build_adapter(
    base: Decoder,
    architecture: Architecture,
    tensors: Tensors,
    *,
    dtype: torch.dtype,
    weights: str = "16bit",
    compiled: bool = False,
) -> tuple[Decoder, Linear]:
    """Read the layer, final norm and input projection of an exit adapter (see `exit_adapter`).

    Args:
        base: its embedding and head are used.
        architecture: of the adapter's layer.
        tensors: the layer and the final norm under the family's names, and the projection.
        dtype: of everything that is not quantized.
        weights: a key of `quantize.WEIGHTS`.
        compiled: use the kernels of `native`, as the base does.

    Returns:
        A decoder of its layers, and the projection of its inputs, [N, 2 D] to [N, D].

    Raises:
        CheckpointError, UnsupportedModelError: as of `build`.
    """
    a, names = architecture, FAMILIES[architecture.family].names
    load = WeightLoader(tensors, names.ignored, dtype, base.device, weights, is_native=compiled)
    projection = load.linear([ADAPTER_PROJECTION], [a.hidden_size], 2 * a.hidden_size)
    kind = native.NativeDecoder if compiled else Decoder
    decoder = kind(
        a,
        embedding=base.embedding,
        layers=[_LayerLoader(a, load, i).layer() for i in range(a.n_layers)],
        final_norm=_norm(a, load, names.final_norm, scale=a.logit_scale),
        head=None if base.tied else base.head,
        dtype=dtype,
        device=base.device,
        weights=weights,
        kv_cache=base.kv_cache,
    )
    load.check_all_used()
    return decoder, projection


def fast_dtype(
    architecture: Architecture, device: torch.device, compiled: bool = False
) -> torch.dtype:
    """Return the dtype in which decoding is fastest.

    bfloat16 on a GPU that has it (else float16), on a CPU with AVX-512, and wherever `build` would use
    the compiled kernels; else float32, since PyTorch is slow with bfloat16 there.
    """
    dtype = torch.bfloat16
    if has_fast_bfloat16(device) or (compiled and native.supports(architecture, dtype, device)):
        return dtype
    return torch.float16 if device.type == "cuda" else torch.float32


class WeightLoader:
    """Reads tensors, checks their shapes, and remembers which were used.

    Args:
        tensors: the checkpoint's.
        ignored: suffixes of names that need no use.
        dtype: of what is not quantized.
        device: of everything.
        weights: a key of `quantize.WEIGHTS`.
        is_native: matrices are packed for the kernels of `native`.
    """

    def __init__(
        self,
        tensors: Tensors,
        ignored: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
        weights: str,
        *,
        is_native: bool = False,
    ) -> None:
        self._pages = LargePages() if is_native else None
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._bits, self._keeps_stored = bits_of(weights), weights == STORED
        self._names = tensors.names()
        self._unused = {n for n in self._names if not n.endswith(ignored)}
        self._in_any_layer = {_without_number(n) for n in self._names}
        self.rotary_layout = tensors.rotary_layout

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        transform: Transform | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a tensor in the decoder's dtype or another; CheckpointError if it is missing."""
        if transform is None:
            return self._cast(self._read(name, shape, dtype or self._dtype), dtype)
        return self._cast(transform(self._read(name, shape)), dtype)

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        """Return the token embedding, [V, D]."""
        weight = self._vocabulary_matrix(name, shape)
        if self._pages is not None:
            matrix = PackedMatrix(weight, pages=self._pages)
            _check_scales(name, matrix.scales)
            return PackedEmbedding(matrix)
        if isinstance(weight, Quantized):
            return QuantizedEmbedding(weight.to(self._device), self._dtype)
        return DenseEmbedding(weight)

    def head(self, name: str, shape: tuple[int, int], *, tied: bool) -> Matrix | None:
        """Return the LM head, or None where it is the embedding."""
        if tied or name not in self._names:
            self._unused.discard(name)
            return None
        return self._linear(name, self._vocabulary_matrix(name, shape), None)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        n_in: int,
        *,
        arrange: Transform | None = None,
        scales: Sequence[float] = (),
        is_quantized: bool = True,
    ) -> Linear:
        """Fuse projections of one input: one name for each, or one tensor that holds them all.

        Args:
            names: of the projections.
            rows: outputs of each projection.
            n_in: inputs.
            arrange: permutes the rows of all projections, concatenated.
            scales: multiply the weights and biases of each projection; empty: none.
            is_quantized: False keeps the weight in the decoder's dtype in any case.
        """
        sizes = rows if len(names) == len(rows) else [sum(rows)]
        parts = [(f"{name}.weight", (size, n_in)) for name, size in zip(names, sizes, strict=True)]
        name = " or ".join(name for name, _ in parts)
        scales = scales or [1.0] * len(rows)
        order = None if arrange is None else arrange(torch.arange(sum(rows)))

        is_scaled = any(scale != 1.0 for scale in scales)

        def fused(tensors: list[Tensor]) -> Tensor:
            # Cast first unless rows are scaled: the stored dtype may be larger.
            tensor = _concat(tensors if is_scaled else [self._cast(tensor) for tensor in tensors])
            if order is not None:  # of row numbers, so that each row is copied once
                tensor = tensor[order.to(tensor.device)]
            return _scale_parts(tensor, rows, scales) if is_scaled else tensor

        biases = self._biases(names, sizes)
        bias = self._cast(fused(biases)) if biases else None
        quantized = self._quantized_parts(parts) if is_quantized else None
        if quantized is not None:
            return self._fused_quantized(name, quantized, rows, order, scales, bias)
        dtype = None if is_scaled else self._dtype
        weight = self._cast(fused([self._read(*part, dtype) for part in parts]))
        return self._linear(name, weight, bias)

    def check_all_used(self) -> None:
        """Refuse a checkpoint with tensors that were not used."""
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            raise UnsupportedModelError(
                f"the checkpoint holds {len(self._unused)} tensors that its family does not use"
                f" ({some}); it needs a family of its own"
            )

    def _biases(self, names: Sequence[str], sizes: Sequence[int]) -> list[Tensor]:
        """Return one bias for each name, or none at all."""
        biases = [
            self._read_if_present(f"{name}.bias", (size,))
            for name, size in zip(names, sizes, strict=True)
        ]
        present = [bias for bias in biases if bias is not None]
        if len(present) not in (0, len(names)):
            raise CheckpointError(f"only some of {list(names)} have a bias")
        return present

    def _linear(
        self, name: str, weight: Tensor | Quantized, bias: Tensor | None, scale: float = 1.0
    ) -> Matrix:
        """Pack a finished matrix for the machine."""
        packed: Matrix
        if self._pages is not None:
            packed = PackedMatrix(weight, bias, self._pages, scale)
            _check_scales(name, packed.scales)
        elif isinstance(weight, Quantized):
            packed = QuantizedLinear(weight.to(self._device), bias, self._dtype, scale)
        else:
            packed = linear(weight, bias)
        self._tensors.release()
        return packed

    def _fused_quantized(
        self,
        name: str,
        tensors: list[Quantized],
        rows: Sequence[int],
        order: Tensor | None,
        scales: Sequence[float],
        bias: Tensor | None,
    ) -> Linear:
        """Fuse projections that may have different formats and scales; see `linear`."""
        sections: list[tuple[Quantized, float, int]] = []  # with the end of its outputs
        begin = end = 0
        for i, (size, scale) in enumerate(zip(rows, scales, strict=True)):
            begin, end = end, end + size
            # One tensor for each projection, or one that holds them all.
            tensor, first = (tensors[i], begin) if len(tensors) == len(rows) else (tensors[0], 0)
            index = slice(begin - first, end - first) if order is None else order[begin:end] - first
            section = tensor.rows(index)
            if sections and (sections[-1][0].kind, sections[-1][1]) == (section.kind, scale):
                section = concat([sections.pop()[0], section])
            sections.append((section, scale, end))
        parts, begin = [], 0
        for section, scale, end in sections:
            parts.append(
                self._linear(name, section, None if bias is None else bias[begin:end], scale)
            )
            begin = end
        if len(parts) == 1:
            return parts[0]
        packed = [part for part in parts if isinstance(part, PackedMatrix)]
        return PackedLinear(packed) if packed else ConcatLinear(parts)

    def _vocabulary_matrix(self, name: str, shape: tuple[int, int]) -> Tensor | Quantized:
        bits = None if self._bits is None else EMBEDDING_BITS
        quantized = self._quantized(name, shape, bits)
        if quantized is not None:
            return quantized
        weight = self(name, shape)
        # The first prompt shows damage of other matrices, but not of these.
        check_finite(name, weight)
        return weight

    def _quantized_parts(self, parts: list[tuple[str, tuple[int, int]]]) -> list[Quantized] | None:
        """Return all matrices of one product, or None if some are not quantized."""
        quantized = [self._quantized(name, shape, self._bits) for name, shape in parts]
        present = [matrix for matrix in quantized if matrix is not None]
        return present if len(present) == len(parts) else None

    def _quantized(self, name: str, shape: tuple[int, int], bits: int | None) -> Quantized | None:
        """Return a matrix quantized to these bits, as stored where that is what is requested.

        Args:
            name: of the tensor.
            shape: that the architecture says.
            bits: None: whatever the file stores; None is returned if that is not quantized.
        """
        if bits is None and not self._keeps_stored:
            return None
        if not self._use(name):
            raise missing(name)
        stored = self._tensors.quantized(name)
        if stored is not None:
            _check_shape(name, stored.shape, shape)
            if bits == 8:
                stored = to_int8(stored)
            elif bits == 4 and stored.kind not in INT4_KINDS:
                stored = None
        if stored is not None or bits is None:
            return stored
        return self._quantize(name, self._read(name, shape), bits)

    def _quantize(self, name: str, weight: Tensor, bits: int) -> Quantized:
        if weight.shape[1] % GROUP:
            raise UnsupportedModelError(
                f"{name} has rows of {weight.shape[1]} weights, which cannot be cut into groups of"
                f" {GROUP} for {bits} bits; load the model with 16bit weights"
            )
        n_rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
        return concat([quantize(chunk, bits) for chunk in weight.split(n_rows)])

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._read_if_present(name, shape, dtype)
        if tensor is None:
            raise missing(name)
        return tensor

    def _read_if_present(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor | None:
        if not self._use(name):
            return None
        tensor = self._tensors.read(name, dtype)
        _check_shape(name, tensor.shape, shape)
        if tensor.ndim == 1:
            check_finite(name, tensor)
        return tensor

    def _use(self, name: str) -> bool:
        """Mark a tensor as used, if there is one.

        Raises:
            CheckpointError: only other layers have such a tensor.
        """
        if name not in self._names:
            if _without_number(name) in self._in_any_layer:
                raise missing(name)
            return False
        self._unused.discard(name)
        return True

    def _cast(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self._device, dtype=dtype or self._dtype)


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise CheckpointError(
            f"{name} has the shape {tuple(shape)}, the config says {tuple(expected)}"
        )


def _concat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _scale_parts(tensor: Tensor, rows: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Multiply each part of the rows by its scale, in float32, so that it is rounded once."""
    parts = zip(tensor.split(list(rows)), scales, strict=True)
    return torch.cat([part if scale == 1.0 else part.float() * scale for part, scale in parts])


def _check_scales(name: str, scales: Sequence[Tensor]) -> None:
    """Raise CheckpointError where scales of a quantized matrix are NaN or Inf."""
    for numbers in scales:
        check_finite(name, numbers)


def _without_number(name: str) -> str:
    return re.sub(r"(?<=\.layers\.)\d+", "", name)


def _times(factor: float) -> Transform | None:
    """Return a multiplication in float32, so that it is rounded once; None for 1."""
    return None if factor == 1.0 else lambda tensor: tensor.float() * factor


def _norm(a: Architecture, load: WeightLoader, name: str, scale: float = 1.0) -> Norm:
    weight = _norm_weight(a, load, name, a.hidden_size, scale)
    if not FAMILIES[a.family].norm_bias:
        return RMSNorm(weight, a.norm_eps)
    return LayerNorm(weight, load(f"{name}.bias", (a.hidden_size,), _times(scale)), a.norm_eps)


def _norm_weight(a: Architecture, load: WeightLoader, name: str, size: int, scale: float) -> Tensor:
    """Return a norm's weight, [size].

    Of 1 + w in float32, as in transformers: w is small, 16 bits would round it away.
    """
    offset = FAMILIES[a.family].norm_offset
    if offset == 0.0:
        return load(f"{name}.weight", (size,), _times(scale))
    return load(
        f"{name}.weight", (size,), lambda weight: (weight.float() + offset) * scale, torch.float32
    )


class _LayerLoader:
    """Loads the parts of one layer."""

    def __init__(self, a: Architecture, load: WeightLoader, index: int) -> None:
        self.a, self.load, self.index = a, load, index
        self.family = FAMILIES[a.family]
        self.names = self.family.names
        self.prefix = self.names.layer.format(index)
        self.q_size, self.kv_size = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.query_scale = 1.0  # beside the division of scores by sqrt(head_dim)
        if a.attention_scale is not None:
            self.query_scale = a.attention_scale * math.sqrt(a.head_dim)

    def layer(self) -> Layer:
        names, qk_norm = self.names, self._qk_norm()
        return Layer(
            attention_norm=self._norm(names.attention_norm),
            qkv=self._qkv(1.0 if qk_norm else self.query_scale),
            qk_norm=qk_norm,
            attention_out=self._residual(names.attention_out, self.q_size),
            attention_post_norm=self._norm(names.attention_post_norm),
            mlp_norm=self._norm(names.mlp_norm),
            mlp=self._mlp(),
            mlp_post_norm=self._norm(names.mlp_post_norm),
        )

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else _norm(self.a, self.load, self.prefix + name)

    def _linear(self, names: Sequence[str], rows: Sequence[int], n_in: int, **how: Any) -> Linear:
        """See `WeightLoader.linear`; names without the layer's prefix."""
        return self.load.linear([self.prefix + name for name in names], rows, n_in, **how)

    def _residual(self, name: str, n_in: int) -> Linear:
        """Load a projection whose output is added to the hidden states."""
        a = self.a
        return self._linear([name], [a.hidden_size], n_in, scales=[a.residual_scale])

    def _qkv(self, query_scale: float) -> Linear:
        def arrange(rows: Tensor) -> Tensor:
            if self.family.qkv_by_head:
                by_head = rows.view(self.a.n_heads, 3, self.a.head_dim, *rows.shape[1:])
                rows = by_head.transpose(0, 1).reshape(rows.shape)
            queries, keys, values = rows.split([self.q_size, self.kv_size, self.kv_size])
            return torch.cat([self._interleaved(queries), self._interleaved(keys), values])

        rows = self.q_size, self.kv_size, self.kv_size
        scales = query_scale, 1.0, 1.0
        return self._linear(
            self.names.qkv, rows, self.a.hidden_size, arrange=arrange, scales=scales
        )

    def _interleaved(self, rows: Tensor) -> Tensor:
        """Order rows of Q, K or their norms so that rotary pairs are neighbours."""
        rope, head_dim = self.a.ropes[self.index], self.a.head_dim
        if self.load.rotary_layout == "interleaved":
            return rows
        return interleave(rows, head_dim, rope.turned(head_dim) if rope else head_dim)

    def _qk_norm(self) -> Norm | None:
        a, head_dim = self.a, self.a.head_dim
        if self.family.qk_norm is None:
            return None
        is_by_head = self.family.qk_norm == "head"

        def weight_of(name: str, size: int, scale: float = 1.0) -> Tensor:
            size = head_dim if is_by_head else size
            return self._interleaved(_norm_weight(a, self.load, self.prefix + name, size, scale))

        queries = weight_of(self.names.query_norm, self.q_size, self.query_scale)
        keys = weight_of(self.names.key_norm, self.kv_size)
        if not is_by_head:
            return ProjectionNorm(queries, keys, a.norm_eps)
        heads = queries.expand(a.n_heads, head_dim), keys.expand(a.n_kv_heads, head_dim)
        return HeadNorm(torch.cat(heads), a.norm_eps)

    def _mlp(self) -> Linear:
        a, names, mixture = self.a, self.names, self.a.mixture
        if mixture is None or self.index not in mixture.layers:
            return self._dense_mlp(names.gate_up, names.down, a.ffn_size)
        experts = []
        for number in range(mixture.n_experts):
            prefix = names.expert.format(number)
            gate_up = [prefix + name for name in names.expert_gate_up]
            experts.append(self._dense_mlp(gate_up, prefix + names.expert_down, mixture.ffn_size))
        router = self._linear(
            [names.router], [mixture.n_experts], a.hidden_size, is_quantized=False
        )
        return Experts(router, experts, mixture.top_k, mixture.normalized)

    def _dense_mlp(self, gate_up_names: Sequence[str], down_name: str, ffn_size: int) -> Linear:
        """Load a gated or plain MLP, or one expert."""
        a, is_gated = self.a, self.family.is_gated
        down = self._residual(down_name, ffn_size)
        gate_up = self._linear(
            gate_up_names, [ffn_size, ffn_size] if is_gated else [ffn_size], a.hidden_size
        )
        return MLP(gate_up, down, a.activation, is_gated=is_gated)
