"""Acceptance of drafted tokens, and the token that follows them. Pure functions, no model.

Both functions return (accepted, next_tokens): accepted [B] counts the leading drafted tokens that are
kept, next_tokens [B] is the model's own token after them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.decoding.sampling import sample


def accept_greedy(draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while the draft agrees with the model's most likely token.

    Args:
        draft: [B, d] int64.
        target: [B, d + 1] int64, the argmax of the model at the drafted positions and one after.
    """
    accepted = _prefix_length(draft == target[:, :-1])
    return accepted, target.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    draft: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept by rejection sampling, so that tokens are distributed exactly as the model's.

    Leviathan et al. (2023), algorithm 1 and theorem 3.5, for any draft distribution q.

    Args:
        draft: [B, d] int64, each token sampled from its row of q.
        draft_probs: q, [B, d, V] float32; None where each row is a point mass on the drafted token.
        target_probs: p, [B, d + 1, V] float32, under the same temperature, top-k, top-p and min-p.
        generator: source of randomness, on the device of p.
    """
    # 1. Keep token x with probability min(1, p(x) / q(x)).
    p = target_probs[:, :-1].gather(2, draft[..., None])[..., 0]
    q = (
        torch.ones_like(p)
        if draft_probs is None
        else draft_probs.gather(2, draft[..., None])[..., 0]
    )
    # In float64: one of 2^24 uniform numbers would accept a token of probability 0.
    u = torch.rand(draft.shape, dtype=torch.float64, device=draft.device, generator=generator)
    accepted = _prefix_length(u * q < p)
    # 2. After a rejection sample from max(p - q, 0), after full acceptance from p.
    rows = torch.arange(len(draft), device=draft.device)
    weights = target_probs[rows, accepted]
    d = draft.shape[1]
    if d:
        at = accepted.clamp(max=d - 1)
        if draft_probs is None:
            q_next = F.one_hot(draft[rows, at], weights.shape[-1]).to(weights.dtype)
        else:
            q_next = draft_probs[rows, at]
        residual = (weights - (accepted < d)[:, None] * q_next).clamp_(min=0.0)
        # Where p and q are equal to the last bit, rounding alone can reject; then p is right.
        weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, weights)
    return accepted, sample(weights, generator)


def _prefix_length(kept: Tensor) -> Tensor:
    """Count the leading True of each row, [B, d] to [B]."""
    return kept.cumprod(dim=1).sum(dim=1)
