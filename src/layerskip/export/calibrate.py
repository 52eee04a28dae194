"""Weights in 4 bits from a calibration text: which inputs each matrix sees.

transformers' own model runs over the text once; each layer in turn notes its matrices' inputs, is
rounded (`gptq`), and hands on what it computes with rounded weights.

Rounding errors that make up for each other: GPTQ (arXiv 2210.17323) on the 4-bit grid.

Columns are rounded one after the other; what the rounding of one does to the layer's output is taken
back, as far as the inputs allow, by changing those that are still to come (eq. 2 and 3 there, with
the Cholesky factor of section 3.3). torchao's GPTQ runs on CUDA alone, and on grids of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.export import hf_config
from layerskip.export.source import Progress, Source
from layerskip.model import checkpoint as row_order
from layerskip.model import families
from layerskip.model.checkpoint import CALIBRATED, Rounding
from layerskip.model.quantize import EMBEDDING_BITS, GROUP, check_groups, no_zero, on_grid, quantize
from layerskip.model.weights import missing

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
_TOP = 15


def compensated(weight: Tensor, hessian: Tensor) -> Tensor:
    """The weight on a grid, so that the layer's output on its inputs changes little.

    Args:
        weight: [out, in], float32.
        hessian: [in, in], sum of x xT over inputs x, float32.

    Returns:
        [out, in], float32.
    """
    factor = _factor(hessian)
    left = weight.clone()  # columns rounded so far; the others as the compensation has them
    for start in range(0, weight.shape[1], GROUP):
        stop = start + GROUP
        errors = _round_group(left[:, start:stop], factor[start:stop, start:stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left


def _round_group(group: Tensor, factor: Tensor) -> Tensor:
    """Round a group [out, GROUP] in place; return the errors to be compensated, [out, GROUP]."""
    # The least and the greatest weight keep the ends of the grid, so that `quantize` finds the same grid
    # in the result: it gives back these numbers.
    grid = quantize(group, 4)
    scales, offsets = grid.scales.float()[:, 0], grid.float_offsets()[:, 0]
    divisors = no_zero(scales)
    least, greatest = group.argmin(1), group.argmax(1)
    errors = torch.empty_like(group)
    for j in range(group.shape[1]):
        column = group[:, j]
        codes = ((column - offsets) / divisors).round_().clamp_(0, _TOP)
        codes.masked_fill_(least == j, 0)
        codes.masked_fill_((greatest == j) & (least != j), _TOP)
        values = codes * scales + offsets
        errors[:, j] = (column - values) / factor[j, j]
        group[:, j + 1 :] -= torch.outer(errors[:, j], factor[j, j + 1 :])
        group[:, j] = values
    return errors


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    unseen = diagonal == 0
    diagonal[unseen] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


WINDOW = 512  # tokens; a longer text gives more of them
WINDOWS = 40  # at most
HELD_OUT = 5  # every so many windows one is left out, to measure on


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `calibrate` made.

    Attributes:
        tensors: name -> numbers on the 4-bit grid, float32, of every matrix in a layer.
        rounding: what they cost.
    """

    tensors: dict[str, Tensor]
    rounding: Rounding


def calibrate(
    source: Source,
    tokens: Sequence[int],
    progress: Progress = lambda done, total: None,
) -> Calibrated:
    """Round the matrices of all layers to 4 bits, and measure what that costs.

    The cost is measured on held-out windows, with embedding and head in 8 bits, as inference has them.

    Args:
        source: a whole model.
        tokens: the calibration text; the first `WINDOW * WINDOWS` are used.
        progress: called with the layers done and their number.

    Raises:
        ValueError: the text is too short, or rows cannot be cut into groups.
    """
    windows = _windows(source, tokens)
    is_held_out = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    model = _model(source)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    for linear in linears.values():
        check_groups(linear.weight.shape)
    with torch.no_grad():
        before = _nll(model, windows[is_held_out])
        for end in {model.get_input_embeddings(), model.get_output_embeddings()}:
            end.weight.copy_(on_grid(end.weight, EMBEDDING_BITS))
        with _rounding(model, progress):
            model(windows[~is_held_out], use_cache=False, logits_to_keep=1)
        after = _nll(model, windows[is_held_out])
    made = {f"{name}.weight": linear.weight.detach() for name, linear in linears.items()}
    return Calibrated(made, Rounding(CALIBRATED, round(after / before - 1, 4)))


def least_bytes(source: Source) -> int:
    """What a checkpoint takes at least whose layers have matrices of `calibrate`, in float32."""
    shapes = {name: source.files.tensors.shape(name) for name in source.names}
    return sum(
        math.prod(shape) * (4 if ".layers." in name and len(shape) == 2 else 2)
        for name, shape in shapes.items()
    )


def _windows(source: Source, tokens: Sequence[int]) -> Tensor:
    size = min(WINDOW, source.architecture.max_context)
    count = min(len(tokens) // size, WINDOWS)
    if count < HELD_OUT:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens; {HELD_OUT * size} are needed at least"
        )
    return torch.tensor(tokens[: count * size]).view(count, size)


def _model(source: Source) -> Any:
    """transformers' model of the source, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = hf_config.config(source, torch.float32)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **families.OWN_KERNELS
    )
    names = set(source.names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in names:
                raise missing(name)
            parameter.copy_(row_order.read(source.files, name, "halves"))
    return model.eval()


@contextmanager
def _rounding(model: Any, progress: Progress) -> Iterator[None]:
    """While this lasts, the first call of a layer rounds it before it answers."""
    layers = model.model.layers

    def first_call(number: int, layer: nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        with _hessians(linears) as hessians:
            plain(*args, **kwargs)
        for linear in linears:
            linear.weight.copy_(compensated(linear.weight, hessians[linear]))
        progress(number + 1, len(layers))
        return plain(*args, **kwargs)

    for number, layer in enumerate(layers):
        layer.forward = functools.partial(first_call, number, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _hessians(linears: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Sum of x xT over the inputs that each of these modules gets while this lasts."""
    found: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = inputs[0].flatten(0, -2)
        found[linear] = x.T @ x

    hooks = [linear.register_forward_hook(note) for linear in linears]
    try:
        yield found
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
