"""Acceptance of drafted tokens, and the token that follows them. Pure functions, no model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerskip.decoding.sampling import sample


def accept_greedy(draft: Sequence[int], target: Sequence[int]) -> int:
    """Return how many leading drafted tokens are the model's most likely ones.

    The model's own token after n accepted ones is `target[n]`.

    Args:
        draft: d tokens.
        target: d + 1 tokens, the argmax of the model at the drafted positions and one after.
    """
    pairs = zip(draft, target, strict=False)
    return next((n for n, (token, own) in enumerate(pairs) if token != own), len(draft))


def accept_sampled(
    draft: Tensor,
    draft_probs: Tensor | None,
    target_probs: Callable[[int, int], Tensor],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept by rejection sampling, so that tokens are distributed exactly as the model's.

    Leviathan et al. (2023), algorithm 1 and theorem 3.5, for any draft distribution q.

    Args:
        draft: [B, d] int64, each token sampled from its row of q.
        draft_probs: q, [B, d, V] float32; None where each row is a point mass on the drafted token.
        target_probs: p; returns the distributions [B, j - i, V] float32 of positions i to j - 1 (of
            0 to d), under the same temperature, top-k, top-p and min-p.
        generator: source of randomness, on the device of p.

    Returns:
        The numbers of leading drafted tokens that are kept [B], and the model's own tokens after them
        [B].
    """
    n_rows, d = draft.shape
    rows = torch.arange(n_rows, device=draft.device)
    # In float64: one of 2^24 uniform numbers would accept a token of probability 0.
    u = torch.rand(draft.shape, dtype=torch.float64, device=draft.device, generator=generator)
    if draft_probs is not None:
        u *= draft_probs.gather(2, draft[..., None])[..., 0]
    # 1. Keep token x with probability min(1, p(x) / q(x)). For one row on a CPU, p is computed position
    # by position up to the first rejection: truncating it by top-k or top-p takes as long as layers.
    is_lazy = n_rows == 1 and draft.device.type == "cpu"
    stride = 1 if is_lazy else d + 1
    accepted = torch.zeros(n_rows, dtype=torch.int64, device=draft.device)
    for start in range(0, d + 1, stride):
        x = draft[:, start : start + stride]
        p = target_probs(start, min(start + stride, d + 1))
        p_x = p[:, : x.shape[1]].gather(2, x[..., None])[..., 0]
        n_kept = _prefix_length(u[:, start : start + stride] < p_x)
        accepted += n_kept
        if is_lazy and not n_kept:
            break
    # 2. After a rejection sample from max(p - q, 0), after full acceptance from p.
    weights = p[rows, accepted - start]
    if d:
        at = accepted.clamp(max=d - 1)
        if draft_probs is None:
            residual = weights.scatter(1, draft[rows, at][:, None], 0.0)
        else:
            residual = (weights - draft_probs[rows, at]).clamp_(min=0.0)
        # Where p and q are equal to the last bit, rounding alone can reject; then p is right.
        is_residual = (accepted < d) & (residual.sum(-1) > 0)
        weights = torch.where(is_residual[:, None], residual, weights)
    return accepted, sample(weights, generator)


def _prefix_length(kept: Tensor) -> Tensor:
    """Count the leading True of each row, [B, d] to [B]."""
    return kept.cumprod(dim=1).sum(dim=1)
