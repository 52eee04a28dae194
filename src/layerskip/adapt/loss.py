"""Loss of drafts against the frozen model: KL over the draft vocabulary, plus weighted CE.

Loss and gradient are computed in one pass over the logits, which are the largest tensors of training.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_ROWS = 128  # whose logits stay in the processor's caches


class SoftCrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum(targets * log softmax(logits)), with weights of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, cap: float | None, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the loss.

        Args:
            ctx: of PyTorch.
            hidden: [N, D], normed states.
            head: [V, D], in the dtype of the products.
            cap: of the logits, or None.
            targets: [N, V], of any sum.
            weights: [N].
        """
        total = weights.sum()
        loss, gradients = hidden.new_zeros(()), []
        chunks = (tensor.split(_CHUNK_ROWS) for tensor in (hidden, targets, weights / total))
        for states, target, weight in zip(*chunks, strict=True):
            logits = logits_of(states, head, cap)
            slope = None if cap is None else 1.0 - (logits / cap) ** 2
            mass, log_sum = target.sum(dim=-1), logits.logsumexp(dim=-1)
            loss += (weight * (mass * log_sum - torch.linalg.vecdot(target, logits))).sum()
            gradient = logits.sub_(log_sum[:, None]).exp_().mul_(mass[:, None]).sub_(target)
            gradient = gradient if slope is None else gradient.mul_(slope)
            gradients.append(gradient.mul_(weight[:, None]).to(head.dtype) @ head)
        ctx.save_for_backward(torch.cat(gradients).to(hidden.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the hidden states."""
        (of_hidden,) = ctx.saved_tensors
        return gradient * of_hidden, None, None, None, None


def logits_of(hidden: Tensor, head: Tensor, cap: float | None) -> Tensor:
    """Return logits [N, V] in float32, of normed states [N, D] and the rows of the head [V, D]."""
    logits = (hidden.to(head.dtype) @ head.T).float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def soft_targets(
    normed: Tensor, head: Tensor, cap: float | None, ce_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the targets of the frozen model's normed states [N, D], and the loss that none is below.

    Returns:
        p + ce_weight * one-hot(argmax p) [N, V], and the entropies of p [N].
    """
    targets, entropies = [], []
    for states in normed.split(_CHUNK_ROWS):
        logits = logits_of(states, head, cap)
        log_sum = logits.logsumexp(dim=-1)
        p = (logits - log_sum[:, None]).exp_()
        entropies.append(log_sum - torch.linalg.vecdot(p, logits))
        choices = logits.argmax(dim=-1, keepdim=True)
        targets.append(p.scatter_add_(1, choices, torch.full_like(p[:, :1], ce_weight)))
    return torch.cat(targets), torch.cat(entropies)
