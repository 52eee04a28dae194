"""Norms of hidden states, and of queries and keys."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
