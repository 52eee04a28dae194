"""The early exit loss: one shared exit after several layers, without growing memory.

LayerSkip (arXiv 2404.16710), section 4.1: `J = sum_l e~(t,l) CE(g(x_{l+1}), Y)`. Logits are what
costs: [exits, B, T, V] of them do not fit. So only labelled positions are looked at, a chunk of
them at a time, and the gradient of a chunk is taken at once, in the forward pass, so that its
logits can go. (Checkpointing the chunk would save the same memory and run the head twice.) A chunk
holds all exits of its tokens: the more exits, the fewer tokens, so the logits' memory does not grow
with them, and the head's gradient, as large as the head, is written as seldom as may be. What every
exit adds is the gradient of its hidden states, [B, T, D] in backward.
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
DEVICES = ("cuda",)  # where its kernels run


def fused_loss(anatomy: ModelParts, device: torch.device) -> FusedLoss | None:
    """An exit's cross entropy by kernels that never hold its logits; None where there are none.

    They need the package liger-kernel, from 0.8 on, a GPU, and a head that is a plain linear layer
    whose weights are all on this device, whose forward is not replaced, and whose logits are not scaled
    afterwards.

    Returns:
        Called with hidden states [N, D] that leave a layer and labels [N], none ignored: the sum in
        nats, a scalar with gradient, and the first choice of every token, int [N].
    """
    head = anatomy.head
    kind = type(head).__bases__[-1] if is_sharded(head) else type(head)  # FSDP2 puts its own before
    is_plain = kind is nn.Linear and "forward" not in vars(head)
    is_plain = is_plain and not hasattr(head.weight, "ds_id")  # DeepSpeed ZeRO-3
    if device.type not in DEVICES or not is_plain or anatomy.logits_factor != 1:
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError:
        return None
    known = inspect.signature(fused).parameters
    if "return_predicted_tokens" not in known:
        return None
    # Of the head's gradient, a sum over many pieces; else that of the weights, 16 bits with FSDP.
    accumulated: dict[str, Any] = {"accum_dtype": torch.float32} if "accum_dtype" in known else {}

    def loss(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        states = anatomy.normed(hidden)
        if torch.is_autocast_enabled(kind):  # which does not reach all products in there
            states = states.to(torch.get_autocast_dtype(kind))
        result = fused(
            states,
            head.weight,
            labels,
            bias=head.bias,
            reduction="sum",
            softcap=anatomy.logits_cap,
            return_predicted_tokens=True,
            **accumulated,
        )
        return result.loss, result.predicted_tokens

    return loss


IGNORED_LABEL = -100
# Logits that exist at one time, in elements: 128 MB in bfloat16, and their gradient is as large.
CHUNK_ELEMENTS = 2**26
# Rows of a chunk at least on a GPU, whatever the vocabulary: with fewer, writing the head's gradient,
# once a chunk, would take longer than its products. With 128,000 tokens that is 524 MB in bfloat16.
LEAST_ROWS_ON_A_GPU = 2048
# Of them those that are worked on at a time in float32: in the caches of a CPU, or 64 MB.
NEAR_ELEMENTS, NEAR_ELEMENTS_ON_A_GPU = 2**20, 2**24


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
    fused: FusedLoss | None = None,
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
        chunk_tokens: rows of logits that exist at one time, those of all exits together; None chooses
            from the vocabulary.
        vocabulary: V.
        fused: takes the place of `shared_exit` and the chunks, one exit after the other; it cannot
            distil.

    Returns:
        Losses; a batch without any label has loss 0 and gradient 0.
    """
    exits = tuple(sorted(weights))
    flat_labels = labels.flatten()
    positions = torch.nonzero(flat_labels != IGNORED_LABEL).flatten()
    targets = flat_labels[positions]
    divisor = at_least_one(len(targets) if num_items is None else num_items)
    kind = labels.device.type
    rows = chunk_tokens or rows_of_chunk(vocabulary, kind)
    # The gradients taken here have not been scaled yet, and most are too small for float16.
    halves = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    work = _Work(
        weights=[weights[e] for e in exits],
        shared_exit=shared_exit,
        positions=positions,
        targets=targets,
        distillation_weight=distillation_weight,
        chunk=max(1, rows // len(exits)),
        needs_gradient=torch.is_grad_enabled(),
        fused=fused,
        in_float32=halves,
    )
    apply: Any = _ExitLoss.apply  # torch leaves it untyped
    with torch.autocast(kind, enabled=False) if halves else contextlib.nullcontext():
        weighted_sum, *figures = apply(work, *(states[e] for e in exits), *parameters)
    loss_sums, correct, divergence_sums = figures
    return ExitLosses(
        loss=weighted_sum / divisor,
        exits=exits,
        loss_sums=loss_sums,
        correct=correct,
        divergence_sums=divergence_sums,
        tokens=len(targets),
    )


def at_least_one(items: Tensor | float) -> Tensor | float:
    """What sums are divided by: where nothing has a label they are 0, and so is the quotient."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def rows_of_chunk(vocabulary: int, device_type: str) -> int:
    """How many rows of logits exist at one time, those of all exits together."""
    least = 1 if device_type == "cpu" else LEAST_ROWS_ON_A_GPU
    return max(least, CHUNK_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class _Work:
    """What `_ExitLoss` needs beside tensors with gradients."""

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
        """The hidden states of some labelled tokens, [E, C, D]."""
        positions = self.positions[rows]
        chosen = torch.stack([one.flatten(0, 1).index_select(0, positions) for one in states])
        return chosen.float() if self.in_float32 else chosen

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Exits and tokens that are worked out together."""
        tokens = len(self.targets)
        if self.fused is not None and tokens:
            for number in range(len(self.weights)):
                yield slice(number, number + 1), slice(None)
            return
        # Chunks of equal size: a small last one would cost as much as the others for the head.
        chunks = math.ceil(tokens / self.chunk)
        for number in range(chunks):
            yield slice(None), slice(number * tokens // chunks, (number + 1) * tokens // chunks)


class _ExitLoss(torch.autograd.Function):
    """Sum over exits of weight x loss, with the gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, parameters = given[: len(work.weights)], given[len(work.weights) :]
        weights = torch.tensor(work.weights, dtype=torch.float32, device=work.targets.device)
        loss_sums, divergence_sums = torch.zeros_like(weights), torch.zeros_like(weights)
        correct = torch.zeros_like(weights, dtype=torch.long)
        needed = work.needs_gradient
        kept = torch.float32 if work.in_float32 else states[0].dtype
        of_labelled = [
            one.new_empty(len(work.targets), one.shape[-1], dtype=kept) for one in states if needed
        ]
        sums: list[Tensor | None] = [None] * len(parameters)
        step_of = _chunk_step if work.fused is None else _fused_step
        for exits, rows in work.pieces():
            chosen = work.labelled(states[exits], rows)
            step = step_of(work, chosen, parameters, work.targets[rows], weights[exits])
            loss_sums[exits] += step.loss_sums
            divergence_sums[exits] += step.divergence_sums
            correct[exits] += step.correct
            if needed and (of_states := step.gradients[0]) is not None:
                for whole, gradient in zip(of_labelled[exits], of_states, strict=True):
                    whole[rows] = gradient
            for index, gradient in enumerate(step.gradients[1:]):
                if gradient is not None:
                    total, more = sums[index], gradient.float()  # many chunks: 16 bits lose the sum
                    sums[index] = more if total is None else total.add_(more)
        ctx.gradients = [*of_labelled, *map(_or_zeros, sums, parameters)] if needed else []
        ctx.positions, ctx.states = work.positions, [(one.shape, one.dtype) for one in states]
        ctx.mark_non_differentiable(loss_sums, correct, divergence_sums)
        distilled = work.distillation_weight * divergence_sums
        return (weights * (loss_sums + distilled)).sum(), loss_sums, correct, divergence_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the early exit loss keeps its gradients for one backward pass only")
        gradients, ctx.gradients = ctx.gradients, None
        of_states: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[1:]  # of states, then of parameters
        for needed, (shape, dtype) in zip(wanted, ctx.states, strict=False):
            found = gradients.pop(0)  # and gone, before there is room for the next exit's
            whole = torch.zeros(shape, dtype=dtype, device=grad.device) if needed else None
            if whole is not None:
                scaled = found.mul_(grad).to(dtype)
                whole.flatten(0, 1).index_copy_(0, ctx.positions, scaled)
            of_states.append(whole)
        return (None, *of_states, *(None if g is None else g.mul_(grad) for g in gradients))


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient for every trainable parameter, since DistributedDataParallel waits for it."""
    if gradient is None:
        return torch.zeros_like(parameter) if parameter.requires_grad else None
    return gradient.to(parameter.dtype)


@dataclass(frozen=True)
class _ChunkStep:
    """What the exits made of a chunk: sums [E], gradients of the weighted loss."""

    loss_sums: Tensor
    divergence_sums: Tensor
    correct: Tensor
    gradients: tuple[Tensor | None, ...]


def _chunk_step(
    work: _Work, states: Tensor, parameters: Sequence[Tensor], targets: Tensor, weights: Tensor
) -> _ChunkStep:
    """Losses and gradients of all exits on one chunk of tokens, states [E, C, D].

    The head's products are those of the whole chunk. What is done number by number to the logits is
    done to a few tokens at a time, which on a CPU stay in its caches meanwhile.
    """
    exits, tokens, _ = states.shape
    with torch.set_grad_enabled(work.needs_gradient):
        states = states.detach().requires_grad_(work.needs_gradient)
        logits = work.shared_exit(states.flatten(0, 1)).unflatten(0, (exits, tokens))
    found = logits.detach()
    slope = torch.empty_like(found) if work.needs_gradient else None
    loss_sums, divergence_sums = torch.zeros_like(weights), torch.zeros_like(weights)
    correct = torch.zeros_like(weights, dtype=torch.long)
    most = NEAR_ELEMENTS if found.device.type == "cpu" else NEAR_ELEMENTS_ON_A_GPU
    near = max(1, most // (exits * found.shape[-1]))
    for begin in range(0, tokens, near):
        rows = slice(begin, begin + near)
        log_p = functional.log_softmax(found[:, rows], -1, dtype=torch.float32)
        wanted = targets[rows, None].expand(exits, -1, 1)
        loss_sums -= log_p.gather(-1, wanted).sum((1, 2))
        correct += (_highest(log_p) == targets[rows]).sum(1)
        q = log_p[-1].exp() if work.distillation_weight > 0 else None
        if q is not None:
            q_log_q = torch.dot(q.flatten(), log_p[-1].flatten())
            for index in range(exits - 1):
                q_log_p = torch.dot(q.flatten(), log_p[index].flatten())
                divergence_sums[index] += q_log_q - q_log_p
        if slope is not None:
            slope[:, rows] = _slope(log_p, q, wanted, weights, work.distillation_weight)
    gradients: tuple[Tensor | None, ...] = ()
    if slope is not None:
        gradients = torch.autograd.grad(logits, (states, *parameters), slope, allow_unused=True)
    return _ChunkStep(loss_sums, divergence_sums, correct, gradients)


def _highest(log_p: Tensor) -> Tensor:
    """Where the first of the highest is, [E, C, V] to [E, C]."""
    if log_p.device.type == "cpu":  # NumPy looks at many numbers at once, PyTorch at one
        return torch.from_numpy(log_p.numpy().argmax(-1))
    return log_p.argmax(-1)


def _slope(
    log_p: Tensor, q: Tensor | None, wanted: Tensor, weights: Tensor, distillation_weight: float
) -> Tensor:
    """The gradient with respect to the logits [E, C, V], in place of their log-probabilities.

    That of cross entropy is p - onehot; distillation with weight b adds b (p - q), q being the last
    exit's probabilities.
    """
    slope = log_p.exp_()
    if q is not None:
        slope[:-1].lerp_(q, -distillation_weight)  # p + b (p - q)
    slope.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
    return slope.mul_(weights[:, None, None])


def _fused_step(
    work: _Work, states: Tensor, parameters: Sequence[Tensor], targets: Tensor, weights: Tensor
) -> _ChunkStep:
    """Loss and gradients of one exit on all tokens, states [1, N, D]."""
    assert work.fused is not None
    with torch.set_grad_enabled(work.needs_gradient):
        states = states.detach().requires_grad_(work.needs_gradient)
        loss_sum, choices = work.fused(states[0], targets)
        gradients: tuple[Tensor | None, ...] = ()
        if work.needs_gradient:
            weighted = weights[0] * loss_sum
            gradients = torch.autograd.grad(weighted, (states, *parameters), allow_unused=True)
    correct = (choices == targets).sum()
    return _ChunkStep(loss_sum.detach()[None], torch.zeros_like(weights), correct[None], gradients)
