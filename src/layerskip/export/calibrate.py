"""int4 weights from a calibration text: GPTQ (arXiv 2210.17323) on the grids of Q4_1 and Q4_0.

transformers' model runs over the text once. Each layer in turn collects the Hessian of its matrices'
inputs, is rounded, and hands on what it computes with rounded weights. Columns are rounded one after the
other, and the error of one is compensated in those still to come (equations 2 and 3, with the Cholesky
factor of section 3.3). torchao's GPTQ runs on CUDA only, and on grids of its own.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from layerskip.export.hf import config
from layerskip.export.source import EMBEDDING, Calibration, Progress, Source
from layerskip.model import families
from layerskip.model.checkpoint import CALIBRATED, Rounding
from layerskip.model.quantize import (
    EMBEDDING_BITS,
    GROUP,
    INT4_KINDS,
    Quantized,
    check_groups,
    from_codes,
    no_zero,
    on_grid,
    rounding_grid,
)
from layerskip.model.weights import missing

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
WINDOW = 512  # tokens
MAX_WINDOWS = 160
HELD_OUT = 5  # one window of so many is left out, to measure on
_MAX_CODE = 15
_SHRINKS = [1 - i / 40 for i in range(13)]  # scales of a centred grid, of that of the extremes


def gptq(weight: Tensor, hessian: Tensor, kind: Kind = Kind.Q4_1) -> Quantized:
    """Round a weight to 4 bits with little change of the layer's outputs on its inputs.

    Args:
        weight: [out, in], float32.
        hessian: [in, in], sum of x xT over inputs x, float32.
        kind: Q4_1, or Q4_0, whose grid is centred on zero.
    """
    factor = _inverse_factor(hessian)
    rest = weight.clone()  # columns to the right of `stop` hold the compensated weights
    groups = []
    for start in range(0, weight.shape[1], GROUP):
        stop = start + GROUP
        inner, group = factor[start:stop, start:stop], rest[:, start:stop]
        rounded = _round_centred if kind == Kind.Q4_0 else _round_to_extremes
        groups.append(rounded(group, inner))
        rest[:, stop:] -= groups[-1].errors @ factor[start:stop, stop:]
    offsets = None if kind == Kind.Q4_0 else torch.cat([g.offsets for g in groups], dim=1)
    codes = torch.cat([group.codes for group in groups], dim=1)
    return from_codes(kind, codes, torch.cat([g.scales for g in groups], dim=1), offsets)


class _Group(NamedTuple):
    """A rounded group: codes [out, GROUP] uint8, scales and offsets [out, 1] float16, errors."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    errors: Tensor


def _round_to_extremes(group: Tensor, factor: Tensor) -> _Group:
    """Round to a grid from the smallest to the largest weight, which keep their ends of it.

    So `quantize` finds the same grid in the result and returns these values.
    """
    scales, offsets, _ = rounding_grid(group[:, None], 4)
    assert offsets is not None
    smallest, largest = group.argmin(1), group.argmax(1)

    def pin(codes: Tensor, j: int) -> None:
        codes.masked_fill_(smallest == j, 0)
        codes.masked_fill_((largest == j) & (smallest != j), _MAX_CODE)

    return _round_group(group, factor, scales, offsets, pin)


def _round_centred(group: Tensor, factor: Tensor) -> _Group:
    """Round to (code - 8) * scale, with the scale of the smallest error among some."""
    extreme = group.gather(1, group.abs().argmax(1, keepdim=True)) / -8
    importance = factor.diagonal() ** -2  # of an error, in the loss that GPTQ minimizes
    best = torch.full_like(extreme, torch.inf)
    scales = extreme.half()
    for shrink in _SHRINKS:
        candidate = (extreme * shrink).half()
        steps = no_zero(candidate.float())
        values = (group / steps).round_().clamp_(-8, 7).mul_(steps)
        error = ((values - group) ** 2 * importance).sum(1, keepdim=True)
        scales = torch.where(error < best, candidate, scales)
        best = torch.minimum(best, error)
    return _round_group(group, factor, scales, (scales.float() * -8).half(), lambda codes, j: None)


def _round_group(
    group: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    pin: Callable[[Tensor, int], None],
) -> _Group:
    """Round the columns of a group [out, GROUP] one after the other; `pin` may change their codes."""
    steps, lowest = scales.float()[:, 0], offsets.float()[:, 0]
    divisors, group = no_zero(steps), group.clone()
    codes, errors = torch.empty_like(group, dtype=torch.uint8), torch.empty_like(group)
    for j in range(group.shape[1]):
        column = group[:, j]
        chosen = ((column - lowest) / divisors).round_().clamp_(0, _MAX_CODE)
        pin(chosen, j)
        errors[:, j] = (column - (chosen * steps + lowest)) / factor[j, j]
        group[:, j + 1 :] -= torch.outer(errors[:, j], factor[j, j + 1 :])
        codes[:, j] = chosen.to(torch.uint8)
    return _Group(codes, scales, offsets, errors)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always zero
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def calibrate(
    source: Source,
    tokens: Sequence[int],
    progress: Progress = lambda done, total: None,
    *,
    kind: Kind = Kind.Q4_1,
    embedding: Kind = Kind.Q8_0,
) -> Calibration:
    """Round the matrices of all layers to int4, and measure the change of the likelihood.

    It is measured on held-out windows, with embedding and head rounded too.

    Args:
        source: a whole model.
        tokens: the calibration text; the first `WINDOW * MAX_WINDOWS` are used.
        progress: called with the number of rounded layers and of all.
        kind: Q4_1 or Q4_0.
        embedding: of embedding and head: Q4_1 or Q4_0, Q8_0 (nearest), or a floating type. In 4 bits,
            the head, also one that is tied, is rounded by its inputs before the layers are.

    Raises:
        ValueError: the text is too short, or rows cannot be cut into groups.
    """
    windows = _windows(source, tokens)
    is_held_out = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    model = _hf_model(source)
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    for linear in linears.values():
        check_groups(linear.weight.shape)
    used, held_out = windows[~is_held_out], windows[is_held_out]
    with torch.no_grad():
        before = _nll(model, held_out)
        tensors = _rounded_vocabulary(model, used, embedding)
        with _rounded_layer_by_layer(model, kind, progress) as rounded:
            model(used, use_cache=False, logits_to_keep=1)
        after = _nll(model, held_out)
    tensors |= {name: rounded[linear] for name, linear in linears.items()}
    return Calibration(tensors, Rounding(CALIBRATED, round(after / before - 1, 4)))


def _rounded_vocabulary(model: Any, windows: Tensor, kind: Kind) -> dict[str, Quantized]:
    """Round embedding and head in the model; return them by name if they are calibrated."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if kind not in INT4_KINDS:
        for module in {head, embedding} if kind == Kind.Q8_0 else ():
            module.weight.copy_(on_grid(module.weight, EMBEDDING_BITS))
        return {}
    is_tied = head.weight is embedding.weight
    with _hessians([head]) as hessians:
        for window in windows:
            model(window[None], use_cache=False)
    rounded = gptq(head.weight, hessians[head], kind)
    head.weight.copy_(rounded.dequantize())
    if is_tied:
        return {EMBEDDING: rounded}
    no_inputs = torch.eye(embedding.weight.shape[1])  # rounds to the nearest
    looked_up = gptq(embedding.weight, no_inputs, kind)
    embedding.weight.copy_(looked_up.dequantize())
    return {EMBEDDING: looked_up, "lm_head.weight": rounded}


def least_bytes(source: Source) -> int:
    """Return the minimum size of a checkpoint whose matrices `calibrate` has rounded, in float32."""
    shapes = {name: source.files.tensors.shape(name) for name in source.names}
    return sum(
        math.prod(shape) * (4 if ".layers." in name and len(shape) == 2 else 2)
        for name, shape in shapes.items()
    )


def _windows(source: Source, tokens: Sequence[int]) -> Tensor:
    size = min(WINDOW, source.architecture.max_context)
    count = min(len(tokens) // size, MAX_WINDOWS)
    if count < HELD_OUT:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens; {HELD_OUT * size} are needed at least"
        )
    return torch.tensor(tokens[: count * size]).view(count, size)


def _hf_model(source: Source) -> Any:
    """transformers' model of the source, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config(source, torch.float32)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields),
        dtype=torch.float32,
        trust_remote_code=False,
        **families.OWN_KERNELS,
    )
    names = set(source.names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in names:
                raise missing(name)
            parameter.copy_(source.read(name))
    return model.eval()


@contextmanager
def _rounded_layer_by_layer(
    model: Any, kind: Kind, progress: Progress
) -> Iterator[dict[nn.Module, Quantized]]:
    """Let the first call of each layer round its weights before it returns its outputs."""
    layers = model.model.layers
    rounded: dict[nn.Module, Quantized] = {}

    def first_call(number: int, layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        with _hessians(linears) as hessians:
            forward(*args, **kwargs)
        for linear in linears:
            rounded[linear] = gptq(linear.weight, hessians[linear], kind)
            linear.weight.copy_(rounded[linear].dequantize())
        progress(number + 1, len(layers))
        return forward(*args, **kwargs)

    for number, layer in enumerate(layers):
        layer.forward = functools.partial(first_call, number, layer, layer.forward)
    try:
        yield rounded
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _hessians(linears: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Sum x xT over the inputs that each of these modules gets inside the block."""
    hessians: dict[nn.Module, Tensor] = {}

    def add(linear: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = inputs[0].flatten(0, -2)
        hessians[linear] = hessians.get(linear, 0) + x.T @ x

    hooks = [linear.register_forward_hook(add) for linear in linears]
    try:
        yield hessians
    finally:
        for hook in hooks:
            hook.remove()


def _nll(model: Any, windows: Tensor) -> float:
    """Mean negative log-likelihood of a token, in nats; one window's logits at a time."""
    total = 0.0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), window[1:]).item()
    return total / len(windows)
