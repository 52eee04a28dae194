"""The lean decoder used for inference: embed, run some layers, logits.

Letters: B batch, T positions in this call, N = B * T, D hidden size, V vocabulary, H heads,
KV key-value heads, G = H / KV, S cache capacity, L layers.
"""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from layerskip.model import rotary
from layerskip.model.cache import KVCache, Span
from layerskip.model.families import Architecture
from layerskip.model.linear import Linear


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer: attention and gated MLP, each after an RMS norm.

    `qk_norm` is [H + KV, head_dim], the norms of queries and keys, or None.
    """

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    attention_out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A decoder-only transformer that can run any contiguous part of its layers."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding: Tensor,
        layers: list[Layer],
        final_norm: Tensor,
        head: Linear,
    ) -> None:
        self.architecture = architecture
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self.frequencies = rotary.frequencies(architecture.rope, architecture.head_dim).to(
            embedding.device
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and of the cache."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def weight_bytes(self) -> int:
        """Bytes that one step of all layers and the head has to read (the embedding is a look-up)."""
        products = [p for w in self.layers for p in (w.qkv, w.attention_out, w.gate_up, w.down)]
        return sum(p.weight_bytes for p in [*products, self.head])

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """An empty cache for all layers; `capacity` counts positions a row."""
        return KVCache(
            self.architecture,
            batch_size=batch_size,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states [B, T, D]."""
        return F.embedding(tokens, self.embedding)

    def run(self, hidden: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """Run layers [start, stop) over the T positions that follow `cache.lengths` in each row.

        The whole model is run(0, L), drafting is run(0, E), verifying is run(E, L). Keys and values
        are written; the lengths are left to the caller, who alone knows which positions will stay.

        Args:
            hidden: [B, T, D], the hidden states that enter layer `start`.
            start: first layer to run, 0 ... L.
            stop: how many layers have run afterwards, start ... L.
            cache: shared by all calls of one generation.

        Returns:
            [B, T, D], the hidden states that leave layer `stop`.
        """
        if start == stop:
            return hidden
        a = self.architecture
        b, t, d = hidden.shape
        span = cache.span(t, start, stop)
        turn = rotary.turns(
            span.positions, self.frequencies, a.n_heads + a.n_kv_heads, a.n_kv_heads
        )
        windows = a.sliding_windows
        masks = {
            window: span.mask(window, self.dtype, a.n_heads // a.n_kv_heads)
            for window in set(windows[start:stop])
        }
        x = hidden.reshape(b * t, d)
        for index in range(start, stop):
            x = self._layer(x, index, span, turn, masks[windows[index]])
        return x.view(b, t, d)

    def logits(self, hidden: Tensor) -> Tensor:
        """The shared exit: final norm and head, [B, T, D] to [B, T, V], in the decoder's dtype."""
        b, t, d = hidden.shape
        return self.head(self._norm(hidden.reshape(b * t, d), self.final_norm)).view(b, t, -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.architecture.norm_eps)

    def _layer(
        self, x: Tensor, index: int, span: Span, turn: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One layer over hidden states [N, D]."""
        w = self.layers[index]
        qkv = w.qkv(self._norm(x, w.attention_norm))
        attended = self._attention(qkv, index, span, turn, mask)
        x = w.attention_out(attended, x)
        gate, up = w.gate_up(self._norm(x, w.mlp_norm)).chunk(2, dim=-1)
        return w.down(F.silu(gate) * up, x)

    def _attention(
        self, qkv: Tensor, index: int, span: Span, turn: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Grouped-query attention: [N, (H + 2 KV) * head_dim] to [N, H * head_dim].

        The G queries that share a KV head become G * T rows of one query block, so that keys and
        values are read once and never repeated.
        """
        a = self.architecture
        b, t, heads, half = turn.shape
        kv, groups, head_dim = a.n_kv_heads, a.n_heads // a.n_kv_heads, a.head_dim
        qk_norm = self.layers[index].qk_norm
        if qk_norm is not None:
            qkv = self._norm_queries_and_keys(qkv, qk_norm)
        pairs = torch.view_as_complex(qkv.float().view(b, t, heads, half, 2))
        turned = torch.view_as_real(pairs * turn).view(b, t, groups + 2, kv, head_dim)
        keys, values = span.write(index, turned[:, :, groups:])
        queries = turned[:, :, :groups].to(self.dtype).view(b, t, kv, groups, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(b, kv, groups * t, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        out = out.view(b, kv, groups, t, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(b * t, a.n_heads * head_dim)

    def _norm_queries_and_keys(self, qkv: Tensor, weight: Tensor) -> Tensor:
        heads = qkv.view(qkv.shape[0], -1, self.architecture.head_dim)
        n = weight.shape[0]
        normed = (
            F.rms_norm(heads[:, :n], weight.shape[1:], None, self.architecture.norm_eps) * weight
        )
        return torch.cat([normed, heads[:, n:]], dim=1).view(qkv.shape)
