"""Token embeddings, which in many models are the head as well."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.linear import Matrix, QuantizedLinear, linear
from layerskip.model.packed import Packed


class Embedding(Protocol):
    """A row of numbers for every token."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] to their rows, [B, T, D]."""
        ...

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """The same matrix as a head, for all tokens or some, [n] int64."""
        ...


class DenseEmbedding:
    """The weight as the checkpoint has it, [V, D]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        return F.embedding(tokens, self.weight)

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """See `Embedding`."""
        return linear(self.weight if token_ids is None else self.weight[token_ids])


class QuantizedEmbedding:
    """A quantized weight, [V, D]; the rows that are asked for become numbers in `dtype`."""

    def __init__(self, weight: Packed, dtype: torch.dtype) -> None:
        self.weight, self._dtype = weight, dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        values = self.weight.rows(tokens.flatten()).dequantize()
        return values.to(self._dtype).view(*tokens.shape, self.weight.shape[1])

    def head(self, token_ids: Tensor | None = None) -> Matrix:
        """See `Embedding`."""
        weight = self.weight if token_ids is None else self.weight.rows(token_ids)
        return QuantizedLinear(weight, None, self._dtype)
