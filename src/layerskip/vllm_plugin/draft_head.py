"""Reduced-vocabulary head for drafts: on a small model the head costs as much as many layers.

Verification scores the whole vocabulary, so nothing is lost but drafts of rare tokens (FR-Spec,
arXiv 2502.14856).
"""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform


class DraftHead(nn.Module):
    """The rows of a model's head for some tokens, whole on every tensor parallel rank.

    Args:
        lm_head: The head, which has weights that are not quantized.
        token_ids: The tokens that can be drafted.
    """

    def __init__(self, lm_head: Any, token_ids: torch.Tensor) -> None:
        super().__init__()
        shard = lm_head.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        is_here = (token_ids >= start) & (token_ids < end)
        rows = lm_head.weight.new_zeros(len(token_ids), lm_head.weight.shape[1])
        rows[is_here] = lm_head.weight[token_ids[is_here] - start]
        if get_tensor_model_parallel_world_size() > 1:
            rows = tensor_model_parallel_all_reduce(rows)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.token_ids = token_ids
        self.method = UnquantizedEmbeddingMethod()
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)  # packs the rows

    @staticmethod
    def fits(lm_head: Any) -> bool:
        """Return True if rows can be taken from this head."""
        return isinstance(getattr(lm_head, "quant_method", None), UnquantizedEmbeddingMethod) and (
            getattr(lm_head, "bias", None) is None
        )

    def top_token_ids(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the [batch_size] best-scored tokens for [batch_size, hidden_size] final states."""
        return self.token_ids[self.method.apply(self, hidden_states).argmax(dim=-1)]
