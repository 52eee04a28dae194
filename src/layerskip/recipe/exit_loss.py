"""The early exit loss: one shared exit after several layers, in constant memory.

LayerSkip (arXiv 2404.16710), section 4.1: `J = sum_l e~(t,l) CE(g(x_{l+1}), Y)`. The logits are
what costs: [exits, B, T, V] of them do not fit. So only labelled positions are computed, a chunk of
them at a time, and the gradient of a chunk is taken at once, in the forward pass, so that its
logits can be freed. (Checkpointing the chunk would save the same memory and run the head twice.) A
chunk holds all exits of its tokens: the more exits, the fewer tokens, so the logits' memory does
not grow with them, and the head's gradient, as large as the head, is written as seldom as possible.
Every further exit adds only the gradient of its hidden states, [B, T, D] in backward.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.recipe.model_parts import ModelParts, is_sharded

FusedLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
FUSED_DEVICES = ("cuda",)  # with Liger's kernels
IGNORED_LABEL = -100
# Logits in memory at a time, in elements: 128 MB in bfloat16, and their gradient is as large.
CHUNK_ELEMENTS = 2**26
# Minimum rows of a chunk on a GPU: with fewer, writing the head's gradient, once a chunk, would take
# longer than its matrix products. With a vocabulary of 128,000 that is 524 MB in bfloat16.
MIN_ROWS_ON_GPU = 2048
# Logits converted to float32 at a time: a tile that fits the caches of a CPU, or 64 MB on a GPU.
TILE_ELEMENTS, TILE_ELEMENTS_ON_GPU = 2**20, 2**24


@dataclass(frozen=True)
class ExitLosses:
    """Losses of a batch. `loss` has a gradient, the other fields are sums without one.

    Attributes:
        loss: the weighted loss, a scalar.
        exits: the exits, ascending; the last is the whole model.
        loss_sums: float [exits], cross entropy summed over the labelled tokens, in nats.
        correct: int [exits], labelled tokens whose label is the exit's argmax.
        divergence_sums: float [exits], KL divergence from the last layer's distribution summed
            over the labelled tokens, in nats; 0 without distillation.
        tokens: number of labelled tokens.
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
    vocab_size: int,
    fused: FusedLoss | None = None,
) -> ExitLosses:
    """Return the weighted loss of several exits, and each exit's own.

    With gradients enabled the gradients of `states` and `parameters` are computed here; backward only
    scales them and can be called once.

    Args:
        states: hidden states [B, T, D] that leave exit E, before the final norm, for every exit in
            `weights`.
        labels: int [B, T], already shifted: the token that position t should predict, or -100.
        weights: weight of each exit; the deepest is the teacher of the distillation.
        shared_exit: g: hidden states [N, D] to logits [N, V].
        parameters: the trainable parameters of `shared_exit`.
        num_items: divisor of the summed loss; None = the labelled tokens of this batch.
        distillation_weight: weight of KL(last || exit) beside the labels for the earlier exits.
        chunk_tokens: rows of logits in memory at a time, all exits together; None chooses from V.
        vocab_size: V.
        fused: replaces `shared_exit` and the chunks, one exit after the other, without distillation.

    Returns:
        Losses; a batch without any label has loss 0 and gradient 0.
    """
    exits = tuple(sorted(weights))
    flat_labels = labels.flatten()
    positions = torch.nonzero(flat_labels != IGNORED_LABEL).flatten()
    targets = flat_labels[positions]
    divisor = at_least_one(len(targets) if num_items is None else num_items)
    device = labels.device.type
    rows = chunk_tokens or rows_of_chunk(vocab_size, device)
    # The gradients taken here are not scaled by the loss scaler yet: most underflow in float16.
    is_float16 = torch.is_autocast_enabled(device) and (
        torch.get_autocast_dtype(device) == torch.float16
    )
    work = _Work(
        weights=[weights[e] for e in exits],
        shared_exit=shared_exit,
        positions=positions,
        targets=targets,
        distillation_weight=distillation_weight,
        chunk=max(1, rows // len(exits)),
        needs_gradient=torch.is_grad_enabled(),
        fused=fused,
        in_float32=is_float16,
    )
    apply: Any = _ExitLoss.apply  # untyped in torch
    with torch.autocast(device, enabled=False) if is_float16 else contextlib.nullcontext():
        weighted_sum, loss_sums, correct, divergence_sums = apply(
            work, *(states[e] for e in exits), *parameters
        )
    return ExitLosses(
        loss=weighted_sum / divisor,
        exits=exits,
        loss_sums=loss_sums,
        correct=correct,
        divergence_sums=divergence_sums,
        tokens=len(targets),
    )


def at_least_one(items: Tensor | float) -> Tensor | float:
    """Clamp a divisor to 1: without any label the sums are 0, and so is the quotient."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def rows_of_chunk(vocab_size: int, device_type: str) -> int:
    """Return the rows of logits in memory at a time, all exits together."""
    min_rows = 1 if device_type == "cpu" else MIN_ROWS_ON_GPU
    return max(min_rows, CHUNK_ELEMENTS // vocab_size)


@dataclass(frozen=True)
class _Work:
    """Arguments of `_ExitLoss` that have no gradient."""

    weights: list[float]
    shared_exit: Callable[[Tensor], Tensor]
    positions: Tensor
    targets: Tensor
    distillation_weight: float
    chunk: int
    needs_gradient: bool
    fused: FusedLoss | None
    in_float32: bool

    def labelled(self, states: Sequence[Tensor], rows: slice) -> Tensor:
        """Gather the hidden states of some labelled tokens, [E, C, D]."""
        positions = self.positions[rows]
        hidden = torch.stack([state.flatten(0, 1).index_select(0, positions) for state in states])
        return hidden.float() if self.in_float32 else hidden

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Iterate over (exits, tokens) whose losses are computed together."""
        tokens = len(self.targets)
        if self.fused is not None and tokens:
            for number in range(len(self.weights)):
                yield slice(number, number + 1), slice(None)
            return
        # Chunks of equal size: for the head a small last one would cost as much as the others.
        count = math.ceil(tokens / self.chunk)
        for number in range(count):
            yield slice(None), slice(number * tokens // count, (number + 1) * tokens // count)


class _ExitLoss(torch.autograd.Function):
    """Sum over exits of weight x loss, with the gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, parameters = tensors[: len(work.weights)], tensors[len(work.weights) :]
        weights = torch.tensor(work.weights, dtype=torch.float32, device=work.targets.device)
        loss_sums, divergence_sums = torch.zeros_like(weights), torch.zeros_like(weights)
        correct = torch.zeros_like(weights, dtype=torch.long)
        has_gradient = work.needs_gradient
        dtype = torch.float32 if work.in_float32 else states[0].dtype
        state_grads = [
            state.new_empty(len(work.targets), state.shape[-1], dtype=dtype)
            for state in states
            if has_gradient
        ]
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        chunk_step = _chunk_step if work.fused is None else _fused_step
        for exits, rows in work.chunks():
            # 1. Gather the hidden states of the chunk's labelled tokens, of all exits.
            hidden = work.labelled(states[exits], rows)
            # 2. Logits, losses and gradients; the logits are freed on return.
            step = chunk_step(work, hidden, parameters, work.targets[rows], weights[exits])
            # 3. Add up.
            loss_sums[exits] += step.loss_sums
            divergence_sums[exits] += step.divergence_sums
            correct[exits] += step.correct
            if has_gradient and (chunk_grads := step.gradients[0]) is not None:
                for state_grad, chunk_grad in zip(state_grads[exits], chunk_grads, strict=True):
                    state_grad[rows] = chunk_grad
            for index, gradient in enumerate(step.gradients[1:]):
                if gradient is not None:  # summed in float32: over many chunks bfloat16 loses bits
                    total, term = parameter_grads[index], gradient.float()
                    parameter_grads[index] = term if total is None else total.add_(term)
        ctx.gradients = []
        if has_gradient:
            ctx.gradients = [*state_grads, *map(_or_zeros, parameter_grads, parameters)]
        ctx.positions, ctx.states = work.positions, [(s.shape, s.dtype) for s in states]
        ctx.mark_non_differentiable(loss_sums, correct, divergence_sums)
        # 4. J = sum over exits of e~(t,l) x (cross entropy + b x KL from the last layer).
        distillation = work.distillation_weight * divergence_sums
        return (weights * (loss_sums + distillation)).sum(), loss_sums, correct, divergence_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the early exit loss keeps its gradients for one backward pass only")
        gradients, ctx.gradients = ctx.gradients, None
        state_grads: list[Tensor | None] = []
        needs_grad = ctx.needs_input_grad[1:]  # of states, then of parameters
        for is_needed, (shape, dtype) in zip(needs_grad, ctx.states, strict=False):
            labelled_grad = gradients.pop(0)  # freed before the next exit's is allocated
            state_grad = torch.zeros(shape, dtype=dtype, device=grad.device) if is_needed else None
            if state_grad is not None:
                scaled = labelled_grad.mul_(grad).to(dtype)
                state_grad.flatten(0, 1).index_copy_(0, ctx.positions, scaled)
            state_grads.append(state_grad)
        return (None, *state_grads, *(None if g is None else g.mul_(grad) for g in gradients))


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient for every trainable parameter: DistributedDataParallel waits for it."""
    if gradient is None:
        return torch.zeros_like(parameter) if parameter.requires_grad else None
    return gradient.to(parameter.dtype)


@dataclass(frozen=True)
class _ChunkStep:
    """Sums [E] over a chunk, and gradients of the weighted loss."""

    loss_sums: Tensor
    divergence_sums: Tensor
    correct: Tensor
    gradients: tuple[Tensor | None, ...]


def _chunk_step(
    work: _Work, states: Tensor, parameters: Sequence[Tensor], targets: Tensor, weights: Tensor
) -> _ChunkStep:
    """Compute losses and gradients of all exits on one chunk of tokens, states [E, C, D].

    The head runs over the whole chunk. Element-wise work on the logits is done in tiles of a few
    tokens, which stay in the caches of a CPU.
    """
    exits, tokens, _ = states.shape
    # 1. The shared exit: logits [E, C, V].
    with torch.set_grad_enabled(work.needs_gradient):
        states = states.detach().requires_grad_(work.needs_gradient)
        logits = work.shared_exit(states.flatten(0, 1)).unflatten(0, (exits, tokens))
    values = logits.detach()
    logits_grad = torch.empty_like(values) if work.needs_gradient else None
    loss_sums, divergence_sums = torch.zeros_like(weights), torch.zeros_like(weights)
    correct = torch.zeros_like(weights, dtype=torch.long)
    elements = TILE_ELEMENTS if values.device.type == "cpu" else TILE_ELEMENTS_ON_GPU
    tile = max(1, elements // (exits * values.shape[-1]))
    for begin in range(0, tokens, tile):
        rows = slice(begin, begin + tile)
        # 2. Cross entropy and accuracy.
        log_p = functional.log_softmax(values[:, rows], -1, dtype=torch.float32)
        target_index = targets[rows, None].expand(exits, -1, 1)
        loss_sums -= log_p.gather(-1, target_index).sum((1, 2))
        correct += (_argmax(log_p) == targets[rows]).sum(1)
        # 3. KL(last || exit), with q the last layer's distribution.
        q = log_p[-1].exp() if work.distillation_weight > 0 else None
        if q is not None:
            q_log_q = torch.dot(q.flatten(), log_p[-1].flatten())
            for index in range(exits - 1):
                q_log_p = torch.dot(q.flatten(), log_p[index].flatten())
                divergence_sums[index] += q_log_q - q_log_p
        # 4. The gradient of the weighted loss with respect to the logits.
        if logits_grad is not None:
            logits_grad[:, rows] = _logits_grad(
                log_p, q, target_index, weights, work.distillation_weight
            )
    # 5. Back through the shared exit.
    gradients: tuple[Tensor | None, ...] = ()
    if logits_grad is not None:
        gradients = torch.autograd.grad(
            logits, (states, *parameters), logits_grad, allow_unused=True
        )
    return _ChunkStep(loss_sums, divergence_sums, correct, gradients)


def _argmax(log_p: Tensor) -> Tensor:
    """Return the index of the first maximum, [E, C, V] to [E, C]."""
    if log_p.device.type == "cpu":  # NumPy's argmax is vectorized, PyTorch's is not
        return torch.from_numpy(log_p.numpy().argmax(-1))
    return log_p.argmax(-1)


def _logits_grad(
    log_p: Tensor, q: Tensor | None, targets: Tensor, weights: Tensor, distillation_weight: float
) -> Tensor:
    """Replace log-probabilities [E, C, V] by the gradient with respect to the logits, in place.

    That of cross entropy is p - onehot; distillation with weight b adds b (p - q), q being the last
    exit's probabilities.
    """
    grad = log_p.exp_()
    if q is not None:
        grad[:-1].lerp_(q, -distillation_weight)  # p + b (p - q)
    grad.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
    return grad.mul_(weights[:, None, None])


def _fused_step(
    work: _Work, states: Tensor, parameters: Sequence[Tensor], targets: Tensor, weights: Tensor
) -> _ChunkStep:
    """Compute loss and gradients of one exit on all tokens, states [1, N, D]."""
    assert work.fused is not None
    with torch.set_grad_enabled(work.needs_gradient):
        states = states.detach().requires_grad_(work.needs_gradient)
        loss_sum, predicted = work.fused(states[0], targets)
        gradients: tuple[Tensor | None, ...] = ()
        if work.needs_gradient:
            weighted = weights[0] * loss_sum
            gradients = torch.autograd.grad(weighted, (states, *parameters), allow_unused=True)
    correct = (predicted == targets).sum()
    return _ChunkStep(loss_sum.detach()[None], torch.zeros_like(weights), correct[None], gradients)


def fused_loss(parts: ModelParts, device: torch.device) -> FusedLoss | None:
    """Return Liger's fused linear cross entropy for this head, or None where it cannot be used.

    The kernels never materialize the logits. They need liger-kernel 0.8 or later, a GPU, and a head
    that is a plain linear layer with its whole weight on this device, its own forward, and logits
    that are not scaled afterwards.

    Returns:
        A function of hidden states [N, D] that leave a layer and labels [N], none ignored: the
        summed cross entropy in nats, a scalar with gradient, and the argmax tokens, int [N].
    """
    head = parts.head
    head_class = (
        type(head).__bases__[-1] if is_sharded(head) else type(head)
    )  # FSDP2 derives a class
    is_plain = head_class is nn.Linear and "forward" not in vars(head)
    is_plain = is_plain and not hasattr(head.weight, "ds_id")  # DeepSpeed ZeRO-3
    if device.type not in FUSED_DEVICES or not is_plain or parts.logits_factor != 1:
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError:
        return None
    options = inspect.signature(fused).parameters
    if "return_predicted_tokens" not in options:
        return None
    # The head's gradient is a sum over many chunks; with FSDP the weights are in bfloat16.
    accumulation: dict[str, Any] = (
        {"accum_dtype": torch.float32} if "accum_dtype" in options else {}
    )

    def loss(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states = parts.normed(hidden)
        if torch.is_autocast_enabled(device.type):  # does not reach into the kernels
            states = states.to(torch.get_autocast_dtype(device.type))
        result = fused(
            states,
            head.weight,
            labels,
            bias=head.bias,
            reduction="sum",
            softcap=parts.logits_cap,
            return_predicted_tokens=True,
            **accumulation,
        )
        return result.loss, result.predicted_tokens

    return loss
