"""Repair of vLLM's sampled speculative decoding on CPU.

In vLLM 0.32 and 0.33, `expand_batch_to_tokens` leaves its result uninitialized on CPU unless the tensor is
int64: `_expand_kernel_impl` in utils/cpu_triton_utils.py lets its kernel write into a copy. Temperatures,
top-p and top-k of the draft tokens are then whatever the memory held before, with every draft model.
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


def repair(rejection_sampler: Any) -> bool:
    """Replace the function in vLLM's module `rejection_sampler` if it is wrong there.

    This module can go when the oldest supported vLLM passes the check.

    Returns:
        True if it was replaced.
    """
    values = torch.tensor([0.5, 0.0, 2.0])
    arguments = (values, torch.tensor([2, 3, 6], dtype=torch.int32), 6, 0, 1)
    expected = expand_batch_to_tokens(*arguments)
    if torch.equal(rejection_sampler.expand_batch_to_tokens(*arguments), expected):
        return False
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True
