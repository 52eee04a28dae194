"""Norms of hidden states, and of queries and keys."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Norm = Callable[[Tensor], Tensor]
"""[N, D] to [N, D]."""


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
        normed = F.rms_norm(heads[:, :n], (head_dim,), None, self.eps) * self.weight
        return torch.cat([normed, heads[:, n:]], dim=1).view(qkv.shape)
