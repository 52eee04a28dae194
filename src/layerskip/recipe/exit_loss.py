"""The early exit loss: one shared exit after several layers, without growing memory.

LayerSkip (arXiv 2404.16710), section 4.1: `J = sum_l e~(t,l) CE(g(x_{l+1}), Y)`. Logits are what
costs: [exits, B, T, V] of them do not fit. So only labelled positions are looked at, a chunk of
them at a time, one exit after the other, and the gradient of a chunk is taken at once, in the
forward pass, so that its logits can go. (Checkpointing the chunk would save the same memory and run
the head twice.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
# Logits that exist at one time, in elements: 128 MB in float32.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class ExitLosses:
    """What the exits made of a batch. `loss` has the gradient, the rest are sums without.

    Attributes:
        loss: the weighted loss, a scalar.
        exits: the exits, ascending; the last is the whole model.
        loss_sums: float [exits], cross entropy summed over the labelled tokens, in nats.
        correct: int [exits], labelled tokens whose label is the exit's first choice.
        divergence_sums: float [exits], KL divergence from the last layer's distribution summed
            over the labelled tokens, in nats; 0 where it was not asked for.
        tokens: labelled tokens.
    """

    loss: Tensor
    exits: tuple[int, ...]
    loss_sums: Tensor
    correct: Tensor
    divergence_sums: Tensor
    tokens: int


def exit_losses(
    states: Mapping[int, Tensor],
    labels: Tensor,
    weights: Mapping[int, float],
    shared_exit: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    num_items: Tensor | float | None = None,
    distillation_weight: float = 0.0,
    chunk_tokens: int | None = None,
    vocabulary: int,
) -> ExitLosses:
    """The weighted loss of several exits, and each exit's own.

    With gradients enabled the gradients of `states` and `parameters` are worked out here; backward
    hands them on, and can be called once.

    Args:
        states: hidden states [B, T, D] that leave exit E, before the final norm, for every exit in
            `weights`.
        labels: int [B, T], already shifted: the token that position t should predict, or -100.
        weights: weight of each exit; the deepest is the one distilled from.
        shared_exit: g: hidden states [N, D] to logits [N, V].
        parameters: the trainable parameters of `shared_exit`.
        num_items: what the summed loss is divided by; None = the labelled tokens of this batch.
        distillation_weight: weight of KL(last || exit) beside the labels for the earlier exits.
        chunk_tokens: tokens a chunk; None chooses from the vocabulary.
        vocabulary: V.

    Returns:
        Losses; a batch without any label has loss 0 and gradient 0.
    """
    exits = tuple(sorted(weights))
    flat_labels = labels.flatten()
    positions = torch.nonzero(flat_labels != IGNORED_LABEL).flatten()
    targets = flat_labels[positions]
    divisor = num_items if num_items is not None else max(len(targets), 1)
    work = _Work(
        weights={e: weights[e] for e in exits},
        shared_exit=shared_exit,
        targets=targets,
        distillation_weight=distillation_weight,
        chunk=chunk_tokens or max(1, CHUNK_ELEMENTS // vocabulary),
        needs_gradient=torch.is_grad_enabled(),
    )
    labelled = [states[e].flatten(0, 1).index_select(0, positions) for e in exits]
    apply: Any = _ExitLoss.apply  # torch leaves it untyped
    weighted_sum, loss_sums, correct, divergence_sums = apply(work, *labelled, *parameters)
    return ExitLosses(
        loss=weighted_sum / divisor,
        exits=exits,
        loss_sums=loss_sums,
        correct=correct,
        divergence_sums=divergence_sums,
        tokens=len(targets),
    )


@dataclass(frozen=True)
class _Work:
    """What `_ExitLoss` needs beside tensors with gradients."""

    weights: dict[int, float]
    shared_exit: Callable[[Tensor], Tensor]
    targets: Tensor
    distillation_weight: float
    chunk: int
    needs_gradient: bool


class _ExitLoss(torch.autograd.Function):
    """Sum over exits of weight x loss, with the gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exits = len(work.weights)
        states, parameters = tensors[:exits], tensors[exits:]
        device = states[0].device
        loss_sums = torch.zeros(exits, device=device)
        divergence_sums = torch.zeros(exits, device=device)
        correct = torch.zeros(exits, dtype=torch.long, device=device)
        gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]
        if not work.needs_gradient:
            gradients = [None] * len(tensors)
        weights = list(work.weights.values())
        for start in range(0, len(work.targets), work.chunk):
            rows = slice(start, start + work.chunk)
            teacher: Tensor | None = None
            # The last layer comes first: the others may be distilled from it.
            for index in reversed(range(exits)):
                step = _chunk_step(work, states[index][rows], parameters, rows, teacher)
                loss_sums[index] += step.loss_sum
                divergence_sums[index] += step.divergence_sum
                correct[index] += step.correct
                if index == exits - 1 and work.distillation_weight > 0:
                    teacher = step.log_probabilities
                if step.gradients:
                    sums = (gradients[index], *gradients[exits:])
                    _add_gradients(sums, step.gradients, rows, weights[index])
        ctx.gradients = gradients
        scale = torch.tensor(weights, device=device)
        distilled = work.distillation_weight * divergence_sums
        ctx.mark_non_differentiable(loss_sums, correct, divergence_sums)
        return (scale * (loss_sums + distilled)).sum(), loss_sums, correct, divergence_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the early exit loss keeps its gradients for one backward pass only")
        gradients, ctx.gradients = ctx.gradients, None
        return (None, *(None if g is None else g.mul_(grad) for g in gradients))


@dataclass(frozen=True)
class _ChunkStep:
    loss_sum: Tensor
    divergence_sum: Tensor | float
    correct: Tensor
    log_probabilities: Tensor | None
    gradients: tuple[Tensor | None, ...]


def _chunk_step(
    work: _Work, state: Tensor, parameters: Sequence[Tensor], rows: slice, teacher: Tensor | None
) -> _ChunkStep:
    """Loss and gradients of one exit on one chunk of tokens, state [C, D].

    The gradient of cross entropy with respect to the logits is p - onehot; distillation with weight
    b adds b (p - q), with q the teacher's probabilities; it is formed in place.
    """
    targets = work.targets[rows, None]
    with torch.set_grad_enabled(work.needs_gradient):
        state = state.detach().requires_grad_(work.needs_gradient)
        logits = work.shared_exit(state)
    log_p = functional.log_softmax(logits.detach(), -1, dtype=torch.float32)
    loss_sum = -log_p.gather(1, targets).sum()
    correct = (logits.detach().argmax(-1, keepdim=True) == targets).sum()
    divergence: Tensor | float = 0.0
    is_teacher = teacher is None and work.distillation_weight > 0
    q = None
    if teacher is not None:
        q = teacher.exp()
        divergence = torch.vdot(q.flatten(), (teacher - log_p).flatten())
    gradients: tuple[Tensor | None, ...] = ()
    if work.needs_gradient:
        slope = log_p.exp() if is_teacher else log_p.exp_()
        if q is not None:
            slope.mul_(1 + work.distillation_weight).sub_(q, alpha=work.distillation_weight)
        slope.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=slope.dtype))
        gradients = torch.autograd.grad(
            logits, (state, *parameters), slope.to(logits.dtype), allow_unused=True
        )
    return _ChunkStep(loss_sum, divergence, correct, log_p if is_teacher else None, gradients)


def _add_gradients(
    sums: Sequence[Tensor | None], new: Sequence[Tensor | None], rows: slice, weight: float
) -> None:
    """Add a chunk's gradients: the state's into its rows, the parameters' whole."""
    for index, (total, gradient) in enumerate(zip(sums, new, strict=True)):
        if total is not None and gradient is not None:
            (total[rows] if index == 0 else total).add_(gradient, alpha=weight)
