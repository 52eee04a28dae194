"""Rotary position embedding as one complex multiplication for queries, keys and values together.

Queries and keys are kept in the interleaved layout: dimensions (2i, 2i+1) of a head are the real and
imaginary part of one complex number, which position t turns by the angle t * frequency_i. Values are
turned by zero, so that one product serves the whole fused QKV row.
"""

import math

import torch
from torch import Tensor

from layerskip.model.families import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position for each of the `head_dim / 2` complex pairs, float32.

    The `llama3` scaling keeps short wavelengths, divides long ones by `factor`, and blends between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freqs: Tensor = 1.0 / (rope.theta**exponents)
    if rope.frequency_factors is not None:
        freqs = freqs / torch.tensor(rope.frequency_factors)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * freqs / (2 * math.pi)  # full turns in the old context
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
        return keep * freqs + (1.0 - keep) * freqs / rope.factor
    return freqs


def turns(positions: Tensor, freqs: Tensor, n_turned: int, n_still: int) -> Tensor:
    """Unit complex numbers that turn the heads of a fused QKV row.

    Args:
        positions: [B, T], the position of every row.
        freqs: [head_dim / 2], from `frequencies`.
        n_turned: heads that turn with the position (queries and keys).
        n_still: heads that do not (values).

    Returns:
        [B, T, n_turned + n_still, head_dim / 2], complex64.
    """
    angles = positions[..., None, None].float() * freqs
    turned = torch.polar(torch.ones_like(angles), angles)
    b, t = positions.shape
    still = torch.ones((), dtype=turned.dtype, device=turned.device).expand(
        b, t, n_still, freqs.numel()
    )
    return torch.cat([turned.expand(b, t, n_turned, -1), still], dim=2)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder Q or K rows from two halves (i, i + head_dim/2) to neighbours (2i, 2i+1).

    Works on weights [heads * head_dim, D], biases [heads * head_dim] and norms [head_dim].
    """
    halves = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
