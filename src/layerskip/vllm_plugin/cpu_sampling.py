"""Repairs of vLLM's sampled speculative decoding on CPU, for all speculative methods.

vLLM 0.32 and 0.33 have two faults there:

- `expand_batch_to_tokens` leaves its result uninitialized unless the tensor is int64:
  `_expand_kernel_impl` in utils/cpu_triton_utils.py lets its kernel write into a copy. The temperature,
  top-p and top-k of draft tokens are then whatever that memory held before.
- `apply_top_k_top_p` with top-k alone fails on no rows: a step in which no request has a draft.

This module can go when the oldest supported vLLM passes the checks in `repair`.
"""

from typing import Any

import torch


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its draft tokens: what vLLM's function is meant to do.

    Args:
        x: [batch_size] values, of any dtype.
        cu_num_tokens: [batch_size] cumulative number of draft tokens.
        num_tokens: The last entry of `cu_num_tokens`.
        replace_from: A value that is replaced.
        replace_to: Its replacement.

    Returns:
        [num_tokens] values.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


def repair(rejection_sampler: Any) -> list[str]:
    """Replace the functions in vLLM's module `rejection_sampler` that are wrong there.

    Returns:
        The names of those that were replaced.
    """
    replaced = []
    values = torch.tensor([0.5, 0.0, 2.0])
    ends = torch.tensor([2, 3, 6], dtype=torch.int32)
    expanded = rejection_sampler.expand_batch_to_tokens(values, ends, 6, 0, 1)
    if expanded.tolist() != [0.5, 0.5, 1.0, 2.0, 2.0, 2.0]:
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        replaced.append("expand_batch_to_tokens")

    apply_top_k_top_p = rejection_sampler.apply_top_k_top_p

    def apply_to_rows(
        logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> torch.Tensor:
        return apply_top_k_top_p(logits, k, p) if len(logits) else logits

    try:
        apply_top_k_top_p(torch.empty(0, 2), torch.empty(0, dtype=torch.int32), None)
    except RuntimeError:
        rejection_sampler.apply_top_k_top_p = apply_to_rows
        replaced.append("apply_top_k_top_p")
    return replaced
