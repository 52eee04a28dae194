"""Weights in 4 bits from a calibration text: which inputs each matrix sees.

transformers' own model runs over the text once; each layer in turn notes its matrices' inputs, is
rounded (`gptq`), and hands on what it computes with rounded weights.
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
from layerskip.export.gptq import compensated
from layerskip.export.source import Source
from layerskip.export.written import Progress
from layerskip.model import families, row_order
from layerskip.model.files.rounding import CALIBRATED, Rounding
from layerskip.model.files.weights import missing
from layerskip.model.quantize import EMBEDDING_BITS, check_groups, on_grid

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
