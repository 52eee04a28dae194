"""Named tensors to a decoder: read, checked, fused, and what can be is folded into the weights.

Folded are the offset of norms with (1 + w), the scale of attention (into the queries' norm or rows),
the scale of the residual (into what is added) and that of the logits (into the final norm), so that
families which have none of them pay nothing.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerskip.model import rotary
from layerskip.model.architecture import Architecture
from layerskip.model.decoder import Decoder, Layer
from layerskip.model.families import FAMILIES, UnsupportedModelError
from layerskip.model.linear import Linear, linear
from layerskip.model.mlp import Experts, GatedMLP, PlainMLP
from layerskip.model.norm import HeadNorm, LayerNorm, Norm, ProjectionNorm, RMSNorm
from layerskip.model.weights import CheckpointError, Tensors, missing


def build(
    architecture: Architecture, tensors: Tensors, *, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    """Read, cast, fuse and pack every weight, one layer at a time.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the architecture says.
        UnsupportedModelError: the checkpoint holds tensors that the decoder has no use for.
    """
    a = architecture
    names = FAMILIES[a.family].names
    take = _Taker(tensors, names.ignored, dtype, torch.device(device))
    embedding = take(f"{names.embedding}.weight", (a.vocab_size, a.hidden_size))
    layers = [_LayerBuilder(a, take, i).build() for i in range(a.n_layers)]
    final_norm = _norm(a, take, names.final_norm, scale=a.logit_scale)
    head = take.optional(f"{names.head}.weight", embedding.shape)
    take.finish()
    return Decoder(
        a,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=None if head is None else linear(head),
    )


Change = Callable[[Tensor], Tensor]
"""What is done to a tensor's rows before it is cast; weights and biases alike."""


class _Taker:
    """Reads tensors, checks their shapes, and remembers which were used."""

    def __init__(
        self,
        tensors: Tensors,
        ignored: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._names = tensors.names()
        self._unused = {n for n in self._names if not n.endswith(ignored)}
        self._in_some_layer = {_without_number(n) for n in self._names}
        self.rotary_layout = tensors.rotary_layout

    def optional(
        self, name: str, shape: tuple[int, ...], change: Change | None = None
    ) -> Tensor | None:
        """The tensor, or None where no layer has it."""
        tensor = self._raw(name, shape)
        return None if tensor is None else self._cast(tensor, change)

    def __call__(self, name: str, shape: tuple[int, ...], change: Change | None = None) -> Tensor:
        tensor = self.optional(name, shape, change)
        if tensor is None:
            raise missing(name)
        return tensor

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        n_in: int,
        change: Change | None = None,
    ) -> Linear:
        """Projections of one input as one product: a name for each, or one that holds them all."""
        sizes = rows if len(names) == len(rows) else [sum(rows)]
        parts = list(zip(names, sizes, strict=True))
        weights = [self._raw(f"{name}.weight", (size, n_in)) for name, size in parts]
        for name, weight in zip(names, weights, strict=True):
            if weight is None:
                raise missing(f"{name}.weight")
        biases = [self._raw(f"{name}.bias", (size,)) for name, size in parts]
        present = [bias for bias in biases if bias is not None]
        if len(present) not in (0, len(names)):
            raise CheckpointError(f"only some of {list(names)} have a bias")
        weight = self._cast(_stack([w for w in weights if w is not None]), change)
        return linear(weight, self._cast(_stack(present), change) if present else None)

    def finish(self) -> None:
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            raise UnsupportedModelError(
                f"the checkpoint holds {len(self._unused)} tensors that its family does not use"
                f" ({some}); it needs a family of its own"
            )

    def _raw(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in self._names:
            if _without_number(name) in self._in_some_layer:
                raise missing(name)
            return None
        self._unused.discard(name)
        tensor = self._tensors.read(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(tensor.shape)}, the config says {tuple(shape)}"
            )
        return tensor

    def _cast(self, tensor: Tensor, change: Change | None) -> Tensor:
        changed = tensor if change is None else change(tensor)
        return changed.to(device=self._device, dtype=self._dtype)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _without_number(name: str) -> str:
    return re.sub(r"(?<=\.layers\.)\d+", "", name)


def _scaled(factor: float) -> Change | None:
    """Multiplication in float32, so that it is rounded once."""
    return None if factor == 1.0 else lambda tensor: tensor.float() * factor


def _norm(a: Architecture, take: _Taker, name: str, scale: float = 1.0) -> Norm:
    weight = take(f"{name}.weight", (a.hidden_size,), _norm_weight(a, scale))
    bias = take.optional(f"{name}.bias", (a.hidden_size,), _scaled(scale))
    return RMSNorm(weight, a.norm_eps) if bias is None else LayerNorm(weight, bias, a.norm_eps)


def _norm_weight(a: Architecture, scale: float = 1.0) -> Change | None:
    offset = FAMILIES[a.family].norm_offset
    if offset == 0.0:
        return _scaled(scale)
    return lambda weight: (weight.float() + offset) * scale


class _LayerBuilder:
    """Takes the parts of one layer."""

    def __init__(self, a: Architecture, take: _Taker, index: int) -> None:
        self.a, self.take, self.index = a, take, index
        self.family = FAMILIES[a.family]
        self.names = self.family.names
        self.prefix = self.names.layer.format(index)
        self.n_queries, self.n_keys = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.query_scale = 1.0  # attention divides by sqrt(head_dim)
        if a.attention_scale is not None:
            self.query_scale = a.attention_scale * math.sqrt(a.head_dim)

    def build(self) -> Layer:
        a, names = self.a, self.names
        qk_norm, added = self._qk_norm(), _scaled(a.residual_scale)
        return Layer(
            attention_norm=self._norm(names.attention_norm),
            qkv=self._qkv(1.0 if qk_norm else self.query_scale),
            qk_norm=qk_norm,
            attention_out=self._linear(
                [names.attention_out], [a.hidden_size], self.n_queries, added
            ),
            attention_post_norm=self._norm(names.attention_post_norm),
            mlp_norm=self._norm(names.mlp_norm),
            mlp=self._mlp(),
            mlp_post_norm=self._norm(names.mlp_post_norm),
        )

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else _norm(self.a, self.take, self.prefix + name)

    def _linear(
        self, names: Sequence[str], rows: Sequence[int], n_in: int, change: Change | None = None
    ) -> Linear:
        return self.take.linear([self.prefix + name for name in names], rows, n_in, change)

    def _qkv(self, query_scale: float) -> Linear:
        scaled = _scaled(query_scale)

        def arranged(rows: Tensor) -> Tensor:
            if self.family.qkv_by_head:
                by_head = rows.view(self.a.n_heads, 3, self.a.head_dim, *rows.shape[1:])
                rows = by_head.transpose(0, 1).reshape(rows.shape)
            queries, keys, values = rows.split([self.n_queries, self.n_keys, self.n_keys])
            queries = queries if scaled is None else scaled(queries)
            return torch.cat([self._turnable(queries), self._turnable(keys), values])

        rows = self.n_queries, self.n_keys, self.n_keys
        return self._linear(self.names.qkv, rows, self.a.hidden_size, arranged)

    def _turnable(self, rows: Tensor) -> Tensor:
        """Rows of Q, K or their norms with rotary pairs side by side."""
        rope, head_dim = self.a.ropes[self.index], self.a.head_dim
        if self.take.rotary_layout == "interleaved":
            return rows
        return rotary.interleave(rows, head_dim, rope.turned(head_dim) if rope else head_dim)

    def _qk_norm(self) -> Norm | None:
        a, hd = self.a, self.a.head_dim
        is_by_head = self.family.qk_norm == "head"
        query_name = f"{self.prefix}{self.names.query_norm}.weight"
        queries = self.take.optional(
            query_name,
            (hd if is_by_head else self.n_queries,),
            _norm_weight(a, self.query_scale),
        )
        if queries is None:
            return None
        key_name = f"{self.prefix}{self.names.key_norm}.weight"
        keys = self.take(key_name, (hd if is_by_head else self.n_keys,), _norm_weight(a))
        queries, keys = self._turnable(queries), self._turnable(keys)
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
        router = self._linear([names.router], [mixture.n_experts], a.hidden_size)
        return Experts(router, experts, mixture.top_k, mixture.normalized)

    def _one_mlp(self, inputs: Sequence[str], output: str, width: int) -> Linear:
        """A gated or plain MLP of a width; `inputs` and `output` are names of its projections."""
        d, activation = self.a.hidden_size, self.a.activation
        down = self._linear([output], [d], width, _scaled(self.a.residual_scale))
        if self.family.is_gated:
            return GatedMLP(self._linear(inputs, [width] * 2, d), down, activation)
        return PlainMLP(self._linear(inputs, [width], d), down, activation)
