"""Named tensors to a decoder: read, checked, fused, and what can be is folded into the weights.

Folded are the offset of norms with (1 + w), the scale of attention (into the queries' norm or rows),
the scale of the residual (into what is added) and that of the logits (into the final norm), so that
families which have none of them pay nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.model import native, rotary, torch_compile
from layerskip.model.architecture import Architecture
from layerskip.model.decoder import Decoder, Layer
from layerskip.model.families import FAMILIES
from layerskip.model.files.weights import Tensors
from layerskip.model.linear import Linear
from layerskip.model.machine import has_fast_bfloat16, leave_out_cudnn_attention
from layerskip.model.mlp import MLP, Experts
from layerskip.model.norm import HeadNorm, LayerNorm, Norm, ProjectionNorm, RMSNorm
from layerskip.model.taker import Change, Taker


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
    take = Taker(
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


def _norm(a: Architecture, take: Taker, name: str, scale: float = 1.0) -> Norm:
    weight = _norm_weight(a, take, name, a.hidden_size, scale)
    if not FAMILIES[a.family].norm_bias:
        return RMSNorm(weight, a.norm_eps)
    return LayerNorm(weight, take(f"{name}.bias", (a.hidden_size,), _scaled(scale)), a.norm_eps)


def _norm_weight(a: Architecture, take: Taker, name: str, size: int, scale: float) -> Tensor:
    """[size]; of 1 + w in float32, as transformers has it: w is small, 16 bits would round it away."""
    offset = FAMILIES[a.family].norm_offset
    if offset == 0.0:
        return take(f"{name}.weight", (size,), _scaled(scale))
    return take(
        f"{name}.weight", (size,), lambda weight: (weight.float() + offset) * scale, torch.float32
    )


class _LayerBuilder:
    """Takes the parts of one layer."""

    def __init__(self, a: Architecture, take: Taker, index: int) -> None:
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
        """See `Taker.linear`; names without the layer's part."""
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
