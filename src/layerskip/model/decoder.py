"""The decoder used for inference: embed, run a range of layers, logits.

Shapes: B batch, T positions in this call, N = B * T, D hidden size, V vocabulary, H heads,
KV key-value heads, G = H / KV, S cache capacity, L layers.

Rotary position embedding is one complex multiplication for queries, keys and values together. Queries
and keys are kept in the interleaved layout: dimensions (2i, 2i+1) of a head are the real and imaginary
part of one complex number, which position t rotates by the angle t * frequency_i. Values are rotated by
zero, and so are dimensions and layers without rotary embedding, so that one product serves the fused
QKV row of every family.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.architecture import Activation, Architecture, Rope
from layerskip.model.kv_cache import KVCache, check_kv_cache
from layerskip.model.linear import Linear, Matrix, QuantizedLinear, linear
from layerskip.model.quantize import Quantized

Norm = Callable[[Tensor], Tensor]
"""[N, D] to [N, D]."""


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; weights may be float32 for any x."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(
            x.dtype
        )


class LayerNorm:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, over the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class HeadNorm:
    """RMS norm of each query and key head in a fused QKV row; values pass.

    `weight` is [H + KV, head_dim].
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, qkv: Tensor) -> Tensor:
        """[N, (H + 2 KV) * head_dim] to the same."""
        n, head_dim = self.weight.shape
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        normed = F.rms_norm(heads[:, :n].to(self.weight.dtype), (head_dim,), None, self.eps)
        normed = normed * self.weight
        return torch.cat([normed.to(qkv.dtype), heads[:, n:]], dim=1).view(qkv.shape)


class ProjectionNorm:
    """RMS norm over all queries and one over all keys in a fused QKV row; values pass."""

    def __init__(self, queries: Tensor, keys: Tensor, eps: float) -> None:
        self.queries, self.keys = RMSNorm(queries, eps), RMSNorm(keys, eps)

    def __call__(self, qkv: Tensor) -> Tensor:
        """[N, (H + 2 KV) * head_dim] to the same."""
        n_keys = self.keys.weight.numel()
        queries, keys, values = qkv.split([self.queries.weight.numel(), n_keys, n_keys], dim=-1)
        return torch.cat([self.queries(queries), self.keys(keys), values], dim=-1)


class Rotary:
    """Rotary embeddings of all layers; layers with the same one are of one kind.

    Attributes:
        kinds: the kind of every layer.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        a = architecture
        self._ropes = list(dict.fromkeys(a.ropes))
        self.kinds = tuple(self._ropes.index(rope) for rope in a.ropes)
        self._heads = a.n_heads + a.n_kv_heads, a.n_kv_heads
        self._short = [frequencies(rope, a.head_dim).to(device) for rope in self._ropes]
        self._long = [
            frequencies(rope, a.head_dim, is_long=True).to(device) for rope in self._ropes
        ]
        self._magnitudes = [magnitudes(rope, a.head_dim).to(device) for rope in self._ropes]
        self._tables: dict[tuple[int, bool], Tensor] = {}

    @property
    def n_kinds(self) -> int:
        """Number of different rotary embeddings."""
        return len(self._ropes)

    def freqs_cis(self, kind: int, positions: Tensor, capacity: int) -> Tensor:
        """Return the factors of a fused QKV row; see the function `freqs_cis`.

        Args:
            kind: of the layer.
            positions: [B, T].
            capacity: of the cache. A whole generation uses LongRoPE's factors for short contexts or
                those for long ones, since the cache holds rotated keys.
        """
        freqs = self._frequencies(kind, self._is_long(kind, capacity))
        return freqs_cis(positions, freqs, *self._heads, self._magnitudes[kind])

    def table(self, kind: int, capacity: int) -> Tensor:
        """Return the factors of queries and keys at every position of a cache, computed once.

        Returns:
            [at least `capacity`, head_dim / 2], complex64.
        """
        key = kind, self._is_long(kind, capacity)
        table = self._tables.get(key)
        if table is None or len(table) < capacity:
            freqs = self._frequencies(*key)
            positions = torch.arange(1 << (capacity - 1).bit_length(), device=freqs.device)[None]
            table = freqs_cis(positions, freqs, 1, 0, self._magnitudes[kind])[0, :, 0].contiguous()
            self._tables[key] = table
        return table

    def _is_long(self, kind: int, capacity: int) -> bool:
        rope = self._ropes[kind]
        return rope is not None and rope.is_long(capacity)

    def _frequencies(self, kind: int, is_long: bool) -> Tensor:
        return (self._long if is_long else self._short)[kind]


def frequencies(rope: Rope | None, head_dim: int, *, is_long: bool = False) -> Tensor:
    """Return the angle per position of each complex pair [head_dim / 2], float32; 0 without rotation.

    The `llama3` scaling keeps short wavelengths, divides long ones by `factor`, and blends between.
    `is_long` takes LongRoPE's factors for contexts above the original one.
    """
    if rope is None:
        return torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
    dim = rope.turned(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    freqs = _scaled(rope, 1.0 / (rope.theta**exponents), is_long)
    return torch.nn.functional.pad(freqs, (0, (head_dim - dim) // 2))


def magnitudes(rope: Rope | None, head_dim: int) -> Tensor:
    """Return the factor of each complex pair of queries and keys, [head_dim / 2]."""
    result = torch.ones(head_dim // 2, dtype=torch.float32, device="cpu")
    if rope is not None:
        result[: rope.turned(head_dim) // 2] = rope.magnitude
    return result


def _scaled(rope: Rope, freqs: Tensor, is_long: bool) -> Tensor:
    factors = rope.frequency_factors
    if is_long and rope.long_factors is not None:
        factors = rope.long_factors
    if factors is not None:
        freqs = freqs / torch.tensor(factors, dtype=torch.float32, device="cpu")
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        rotations = rope.original_max_positions * freqs / (2 * math.pi)  # in the original context
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((rotations - rope.low_freq_factor) / span).clamp(0.0, 1.0)
        return keep * freqs + (1.0 - keep) * freqs / rope.factor
    return freqs


def freqs_cis(
    positions: Tensor, freqs: Tensor, n_rotated: int, n_unrotated: int, magnitudes: Tensor
) -> Tensor:
    """Return the complex factors that rotate the heads of a fused QKV row.

    Args:
        positions: [B, T], the position of every row.
        freqs: [head_dim / 2], from `frequencies`.
        n_rotated: number of heads that are rotated (queries and keys).
        n_unrotated: number of heads that are not (values).
        magnitudes: [head_dim / 2], from `magnitudes`; 1 but for LongRoPE.

    Returns:
        [B, T, n_rotated + n_unrotated, head_dim / 2], complex64.
    """
    angles = positions[..., None, None].float() * freqs
    turned = torch.polar(magnitudes.expand_as(angles), angles)
    b, t = positions.shape
    unrotated = torch.ones((), dtype=turned.dtype, device=turned.device).expand(
        b, t, n_unrotated, freqs.numel()
    )
    return torch.cat([turned.expand(b, t, n_rotated, -1), unrotated], dim=2)


def interleave(rows: Tensor, head_dim: int, turned: int) -> Tensor:
    """Reorder Q or K rows from two halves (i, i + n/2) to neighbours (2i, 2i+1), n dimensions a head.

    For weights [heads * head_dim, D], biases [heads * head_dim] and norms [head_dim]. Dimensions beyond
    the first `turned` of a head stay where they are.
    """
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    halves = heads[:, :turned].unflatten(1, (2, turned // 2))
    neighbours = halves.transpose(1, 2).flatten(1, 2)
    return torch.cat([neighbours, heads[:, turned:]], dim=1).reshape(rows.shape)


class Embedding(Protocol):
    """A row of numbers for every token."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the rows of token ids, [B, T] to [B, T, D]."""
        ...

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """Return the matrix as a head, for all tokens or some, [n] int64."""
        ...


class DenseEmbedding:
    """The weight as the checkpoint has it, [V, D]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        return F.embedding(tokens, self.weight)

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """See `Embedding`."""
        return linear(self.weight if token_ids is None else self.weight[token_ids])


class QuantizedEmbedding:
    """A quantized weight, [V, D], whose rows are dequantized to `dtype`."""

    def __init__(self, weight: Quantized, dtype: torch.dtype) -> None:
        self.weight, self._dtype = weight, dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        values = self.weight.rows(tokens.flatten()).dequantize()
        return values.to(self._dtype).view(*tokens.shape, self.weight.shape[1])

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """See `Embedding`."""
        weight = self.weight if token_ids is None else self.weight.rows(token_ids)
        return QuantizedLinear(weight, None, self._dtype)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class MLP:
    """down(activation(up(x))), or gated down(activation(gate(x)) * up(x)).

    `gate_up` is one product for gate and up, or for up alone.
    """

    def __init__(
        self, gate_up: Linear, down: Linear, activation: Activation, *, is_gated: bool
    ) -> None:
        self.gate_up, self.down, self.is_gated = gate_up, down, is_gated
        self.activation = ACTIVATIONS[activation]

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.gate_up.weight_bytes + self.down.weight_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, D] (and a residual [N, D]) to [N, D]."""
        if not self.is_gated:
            return self.down(self.activation(self.gate_up(x)), residual)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, residual)


class Experts:
    """A mixture of experts: each row goes through the `top_k` MLPs that the router prefers.

    An expert computes only the rows routed to it. Their number has to be known on the host, so an
    accelerator synchronizes once a layer.
    """

    def __init__(
        self, router: Linear, experts: Sequence[Linear], top_k: int, normalized: bool
    ) -> None:
        self.router, self.experts = router, experts
        self.top_k, self.normalized = top_k, normalized

    @property
    def weight_bytes(self) -> int:
        """Bytes that one row has to read: the router and `top_k` experts."""
        return self.router.weight_bytes + self.top_k * self.experts[0].weight_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, D] (and a residual [N, D]) to [N, D]."""
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        weights, chosen = weights.flatten(), chosen.flatten()
        order = chosen.argsort(stable=True)  # by expert; stable, so that rows keep their order
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        # The residual comes last: in 16 bits it would swallow small parts.
        out = torch.zeros_like(x)
        for expert, routed in zip(self.experts, order.split(counts), strict=True):
            if len(routed):
                rows = routed // self.top_k
                out.index_add_(0, rows, (expert(x[rows]) * weights[routed, None]).to(x.dtype))
        return out if residual is None else residual + out


NON_FINITE_MESSAGE = (
    "this model's results are not finite (NaN or infinite): take another dtype, such as bfloat16"
    " in place of float16, or its weights are damaged"
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer; None where a family lacks a part.

    `qk_norm` is over queries and keys in the fused QKV row. `mlp` is a gated MLP, a plain one or a
    mixture of experts, all of which are called like a `Linear`. Post norms are applied to
    the outputs of attention and MLP before they are added.
    """

    attention_norm: Norm | None
    qkv: Linear
    qk_norm: Norm | None
    attention_out: Linear
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Linear
    mlp_post_norm: Norm | None


class AttentionView(Protocol):
    """Positions of a pass, and the keys and values that they attend to (`CacheView` is one)."""

    @property
    def positions(self) -> Tensor:
        """[B, T] int64."""
        ...

    def write(self, layer: int, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """See `CacheView.write`."""
        ...

    def mask(self, window: int | None, dtype: torch.dtype, groups: int) -> Tensor | None:
        """See `CacheView.mask`."""
        ...


class Decoder:
    """A decoder-only transformer that can run any contiguous part of its layers.

    Attributes:
        dtype: of hidden states and, unless `kv_cache` is "int8", of the cache.
        device: where the weights are.
        weights: their format, a key of `quantize.WEIGHTS`.
        kv_cache: precision of its caches, one of `kv_cache.KV_CACHES`.
        kernels: "pytorch", "compiled" (see `native`) or "torch.compile" (see
            `torch_compile`).
        drafts_in_one_call: whether there is `greedy_draft` (of a `NativeDecoder`).
    """

    kernels = "pytorch"
    drafts_in_one_call = False

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding: Embedding,
        layers: list[Layer],
        final_norm: Norm,
        head: Matrix | None,
        dtype: torch.dtype,
        device: torch.device,
        weights: str,
        kv_cache: str = "auto",
    ) -> None:
        """Assemble the parts; without a head, the embedding is used."""
        check_kv_cache(kv_cache)
        self.architecture = architecture
        self.dtype, self.device, self.weights = dtype, device, weights
        self.kv_cache = kv_cache
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.tied = head is None
        self.heads: tuple[Matrix, ...] = (embedding.head() if head is None else head,)
        self.rotary = Rotary(architecture, device)
        # In the dtype of the hidden states, as in training. It is not multiplied into the embedding,
        # which most of these families also use as their head.
        scale = architecture.embedding_scale
        self.embedding_scale = (
            None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
        )

    @property
    def head(self) -> Matrix:
        """The matrix of the shared exit, or the first of them (see `concat_heads`)."""
        return self.heads[0]

    @property
    def head_bytes(self) -> int:
        """Bytes of weights that the logits read."""
        return sum(head.weight_bytes for head in self.heads)

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one step reads (of the embedding, only a row)."""
        products = [p for w in self.layers for p in (w.qkv, w.attention_out, w.mlp)]
        return sum(p.weight_bytes for p in [*products, self.head])

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values in `new_cache`."""
        return torch.int8 if self.kv_cache == "int8" else self.dtype

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """Return an empty cache for all layers; `capacity` is in positions a row."""
        return KVCache(
            self.architecture,
            batch_size=batch_size,
            capacity=capacity,
            dtype=self.cache_dtype,
            device=self.device,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states of token ids, [B, T] to [B, T, D]."""
        hidden = self.embedding(tokens)
        return hidden if self.embedding_scale is None else hidden * self.embedding_scale

    def run(self, hidden: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """Run layers [start, stop) over the T positions that follow `cache.lengths` in each row.

        The whole model is run(0, L), drafting is run(0, E), verifying is run(E, L). Keys and values
        are written; the lengths are left to the caller, who knows which positions will be kept.

        Args:
            hidden: [B, T, D], the hidden states that enter layer `start`.
            start: first layer to run, 0 ... L.
            stop: how many layers have run afterwards, start ... L.
            cache: shared by all calls of one generation.

        Returns:
            [B, T, D], the hidden states that leave layer `stop`.

        Raises:
            ValueError: there are no such layers, or the cache has no room.
        """
        self._check_layers(start, stop)
        if start == stop:
            return hidden
        span = cache.span(hidden.shape[1], start, stop)
        return self.run_view(hidden, start, stop, span, cache.capacity)

    def run_rows(
        self, hidden: Tensor, start: int, stop: int, rows: Sequence[tuple[KVCache, int]]
    ) -> Tensor:
        """Run layers [start, stop) over several rows, each with its own cache and number of positions.

        Matrix products are over the positions of all rows, attention is row by row.

        Args:
            hidden: [N, D], the hidden states of all rows one after another.
            start: see `run`.
            stop: see `run`.
            rows: for each row its cache, of batch size 1, and how many of the N positions it has.

        Returns:
            [N, D].

        Raises:
            ValueError: see `run`.
        """
        self._check_layers(start, stop)
        if start == stop:
            return hidden
        spans = [(cache.span(n, start, stop), cache.capacity) for cache, n in rows]
        return self._through_layers(hidden, start, stop, spans)

    def run_view(
        self, hidden: Tensor, start: int, stop: int, span: AttentionView, capacity: int
    ) -> Tensor:
        """Run layers over a view of a cache of `capacity` positions; see `run`."""
        b, t, d = hidden.shape
        x = self._through_layers(hidden.reshape(b * t, d), start, stop, [(span, capacity)])
        return x.view(b, t, d)

    def _through_layers(
        self, x: Tensor, start: int, stop: int, spans: Sequence[tuple[AttentionView, int]]
    ) -> Tensor:
        """Run layers over hidden states [N, D] of views of caches with their capacities."""
        a = self.architecture
        kinds, windows = self.rotary.kinds, a.sliding_windows
        freqs_cis = {
            kind: [self.rotary.freqs_cis(kind, span.positions, n) for span, n in spans]
            for kind in set(kinds[start:stop])
        }
        masks = {
            window: [span.mask(window, self.dtype, a.n_heads // a.n_kv_heads) for span, _ in spans]
            for window in set(windows[start:stop])
        }
        views = [span for span, _ in spans]
        for index in range(start, stop):
            x = self._layer(x, index, views, freqs_cis[kinds[index]], masks[windows[index]])
        return x

    def _check_layers(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self.layers):
            raise ValueError(
                f"layers {start} to {stop} cannot be run: this model has {len(self.layers)}"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the shared exit, final norm and head: [B, T, D] to [B, T, V], in the decoder's dtype."""
        b, t, d = hidden.shape
        normed = self.final_norm(hidden.reshape(b * t, d))
        products = [head(normed) for head in self.heads]
        return self._capped([product.view(b, t, product.shape[1]) for product in products])

    def _capped(self, products: list[Tensor]) -> Tensor:
        """Concatenate the heads' products [B, T, n] and apply the logit cap."""
        logits = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        cap = self.architecture.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def greedy_tokens(self, hidden: Tensor) -> Tensor:
        """Return the argmax of the logits, [B, T, D] to [B, T] int64."""
        return argmax(self.logits(hidden))

    def greedy_step(
        self, tokens: Tensor, stop: int, cache: KVCache, *, with_confidence: bool = False
    ) -> tuple[Tensor, Tensor, float]:
        """Run tokens through layers [0, stop) and choose the next one greedily at the shared exit.

        Args:
            tokens: [B, T] int64, those that follow the cache.
            stop: how many layers run: E for a draft, L for a plain step.
            cache: its lengths are left to the caller, as by `run`.
            with_confidence: compute the highest softmax probability, of one row.

        Returns:
            The hidden states that leave layer `stop` [B, T, D], the next tokens [B, 1], and the
            probability of the first row's (1.0 where it is not computed).
        """
        embedded = self.embed(tokens)
        return self.greedy_pass(embedded, (0, stop), cache, with_confidence=with_confidence)

    def greedy_pass(
        self,
        hidden: Tensor,
        layers: tuple[int, int],
        cache: KVCache,
        *,
        n_scored: int = 1,
        with_confidence: bool = False,
    ) -> tuple[Tensor, Tensor, float]:
        """Run hidden states through some layers and choose the next tokens at the shared exit.

        Args:
            hidden: [B, T, D], those that follow the cache.
            layers: the layers [start, stop) that run.
            cache: as in `greedy_step`.
            n_scored: number of last positions after which a token is chosen.
            with_confidence: compute the highest softmax probability, at the first of them.

        Returns:
            As `greedy_step`, with next tokens [B, n_scored].
        """
        hidden = self.run(hidden, *layers, cache)
        scored = hidden[:, -n_scored:]
        if not with_confidence:
            return hidden, self.greedy_tokens(scored), 1.0
        tokens, confidences = self.greedy_choice(scored)
        return hidden, tokens, float(confidences[0, 0])

    def greedy_choice(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the argmax of the logits and its softmax probability, [B, T, D] to [B, T] each."""
        logits = self.logits(hidden)
        return argmax(logits), logits.float().softmax(dim=-1).amax(dim=-1)

    def with_reduced_head(self, token_ids: Tensor) -> "Decoder":
        """Return this decoder with a head for some tokens alone, [n] int64; the layers are shared."""
        reduced = copy.copy(self)
        rows = self.embedding.head(token_ids) if self.tied else self.head.rows(token_ids)
        reduced.heads = (rows,)
        return reduced

    def concat_heads(self, other: "Decoder") -> "Decoder":
        """Return this decoder with another one's logits behind its own; nothing is copied."""
        both = copy.copy(self)
        both.heads = (*self.heads, *other.heads)
        return both

    def _layer(
        self,
        x: Tensor,
        index: int,
        spans: Sequence[AttentionView],
        turns: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """Run one layer over hidden states [N, D] of some views."""
        w = self.layers[index]
        normed = x if w.attention_norm is None else w.attention_norm(x)
        parts = w.qkv(normed).split([span.positions.numel() for span in spans])
        outputs = [
            self._attention(part, index, span, turn, mask)
            for part, span, turn, mask in zip(parts, spans, turns, masks, strict=True)
        ]
        heads = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        attended = _add(x, w.attention_out, heads, w.attention_post_norm)
        mlp_input = x if self.architecture.parallel_residual else attended
        normed = mlp_input if w.mlp_norm is None else w.mlp_norm(mlp_input)
        return _add(attended, w.mlp, normed, w.mlp_post_norm)

    def _attention(
        self, qkv: Tensor, index: int, span: AttentionView, turn: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Grouped-query attention, [N, (H + 2 KV) * head_dim] to [N, H * head_dim].

        The G queries that share a KV head become G * T rows of one query block, so that keys and
        values are read once and never repeated.
        """
        a = self.architecture
        b, t, heads, half = turn.shape
        kv, groups, head_dim = a.n_kv_heads, a.n_heads // a.n_kv_heads, a.head_dim
        qk_norm = self.layers[index].qk_norm
        if qk_norm is not None:
            qkv = qk_norm(qkv)
        pairs = torch.view_as_complex(qkv.float().view(b, t, heads, half, 2))
        turned = torch.view_as_real(pairs * turn).view(b, t, groups + 2, kv, head_dim)
        keys, values = (
            states.to(self.dtype) for states in span.write(index, turned[:, :, groups:])
        )
        queries = turned[:, :, :groups].to(self.dtype).view(b, t, kv, groups, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(b, kv, groups * t, head_dim)
        if a.attention_cap is None:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        else:
            out = _capped_attention(queries, keys, values, mask, a.attention_cap)
        out = out.view(b, kv, groups, t, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(b * t, a.n_heads * head_dim)


def argmax(logits: Tensor) -> Tensor:
    """Return the first of the highest logits, [B, T, V] to [B, T] int64."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # NumPy's argmax is eight times as fast as PyTorch's over a few rows of a vocabulary.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _add(residual: Tensor, product: Linear, x: Tensor, post_norm: Norm | None) -> Tensor:
    """Return residual + product(x), in one call where no norm comes between."""
    if post_norm is None:
        return product(x, residual)
    return residual + post_norm(product(x))


def _capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cap: float
) -> Tensor:
    """`F.scaled_dot_product_attention` with soft-capped scores, cap * tanh(scores / cap)."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
