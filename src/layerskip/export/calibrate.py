"""int4 weights from a calibration text: GPTQ (arXiv 2210.17323) on the grid of `model.quantize`.

transformers' model runs over the text once. Each layer in turn collects the Hessian of its matrices'
inputs, is rounded, and hands on what it computes with rounded weights. Columns are rounded one after the
other, and the error of one is compensated in those still to come (equations 2 and 3, with the Cholesky
factor of section 3.3). torchao's GPTQ runs on CUDA only, and on grids of its own.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.export.hf import config
from layerskip.export.source import Calibration, Progress, Source
from layerskip.model import families
from layerskip.model.checkpoint import CALIBRATED, Rounding
from layerskip.model.quantize import EMBEDDING_BITS, GROUP, check_groups, no_zero, on_grid, quantize
from layerskip.model.weights import missing

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
WINDOW = 512  # tokens
MAX_WINDOWS = 40
HELD_OUT = 5  # one window of so many is left out, to measure on
_MAX_CODE = 15


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """Round a weight to the int4 grid with little change of the layer's outputs on its inputs.

    Args:
        weight: [out, in], float32.
        hessian: [in, in], sum of x xT over inputs x, float32.

    Returns:
        [out, in], float32.
    """
    factor = _inverse_factor(hessian)
    rounded = weight.clone()  # columns to the right of `stop` hold the compensated weights
    for start in range(0, weight.shape[1], GROUP):
        stop = start + GROUP
        errors = _round_group(rounded[:, start:stop], factor[start:stop, start:stop])
        rounded[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def _round_group(group: Tensor, factor: Tensor) -> Tensor:
    """Round a group [out, GROUP] in place; return the errors to compensate, [out, GROUP]."""
    # The smallest and the largest weight keep the ends of the grid, so that `quantize` finds the same
    # grid in the result and returns these values.
    grid = quantize(group, 4)
    scales, offsets = grid.scales.float()[:, 0], grid.float_offsets()[:, 0]
    divisors = no_zero(scales)
    smallest, largest = group.argmin(1), group.argmax(1)
    errors = torch.empty_like(group)
    for j in range(group.shape[1]):
        column = group[:, j]
        codes = ((column - offsets) / divisors).round_().clamp_(0, _MAX_CODE)
        codes.masked_fill_(smallest == j, 0)
        codes.masked_fill_((largest == j) & (smallest != j), _MAX_CODE)
        values = codes * scales + offsets
        errors[:, j] = (column - values) / factor[j, j]
        group[:, j + 1 :] -= torch.outer(errors[:, j], factor[j, j + 1 :])
        group[:, j] = values
    return errors


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
) -> Calibration:
    """Round the matrices of all layers to int4, and measure the change of the likelihood.

    It is measured on held-out windows, with embedding and head in int8, as inference has them.

    Args:
        source: a whole model.
        tokens: the calibration text; the first `WINDOW * MAX_WINDOWS` are used.
        progress: called with the number of rounded layers and of all.

    Raises:
        ValueError: the text is too short, or rows cannot be cut into groups.
    """
    windows = _windows(source, tokens)
    is_held_out = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    model = _hf_model(source)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    for linear in linears.values():
        check_groups(linear.weight.shape)
    with torch.no_grad():
        before = _nll(model, windows[is_held_out])
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight.copy_(on_grid(module.weight, EMBEDDING_BITS))
        with _rounded_layer_by_layer(model, progress):
            model(windows[~is_held_out], use_cache=False, logits_to_keep=1)
        after = _nll(model, windows[is_held_out])
    tensors = {f"{name}.weight": linear.weight.detach() for name, linear in linears.items()}
    return Calibration(tensors, Rounding(CALIBRATED, round(after / before - 1, 4)))


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
def _rounded_layer_by_layer(model: Any, progress: Progress) -> Iterator[None]:
    """Let the first call of each layer round its weights before it returns its outputs."""
    layers = model.model.layers

    def first_call(number: int, layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        with _hessians(linears) as hessians:
            forward(*args, **kwargs)
        for linear in linears:
            linear.weight.copy_(gptq(linear.weight, hessians[linear]))
        progress(number + 1, len(layers))
        return forward(*args, **kwargs)

    for number, layer in enumerate(layers):
        layer.forward = functools.partial(first_call, number, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _hessians(linears: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Sum x xT over the inputs that each of these modules gets inside the block."""
    hessians: dict[nn.Module, Tensor] = {}

    def add(linear: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = inputs[0].flatten(0, -2)
        hessians[linear] = x.T @ x

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
