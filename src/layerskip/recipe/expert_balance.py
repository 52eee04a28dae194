"""The load balancing loss of a mixture of experts, where not every layer saw every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Switch Transformers (arXiv 2101.03961), equations 4 to 6, over the tokens that were routed.

    transformers has the same sum, but takes every layer to have routed the whole batch.

    Args:
        router_logits: [tokens, experts] of each layer that ran, without padding; at least one.
        top_k: experts a token is sent to.

    Returns:
        A scalar: `experts * sum_e (share of tokens sent to e) * (mean probability of e)`.
    """
    probabilities = torch.cat([logits.float().softmax(-1) for logits in router_logits])
    tokens, experts = probabilities.shape
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    share = torch.zeros(experts, device=chosen.device).index_add_(
        0, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )
    return experts * (share / tokens * probabilities.mean(0)).sum()
