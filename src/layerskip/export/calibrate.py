"""Weights from a calibration text, in 4 bits or as a difference: which inputs each matrix sees.

transformers' own model runs over the text once; each layer in turn notes its matrices' inputs, is
rounded (`gptq`), and hands on what it computes with rounded weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.export import hf_config
from layerskip.export.gptq import compensated, levels_of
from layerskip.export.source import Source
from layerskip.export.written import Progress
from layerskip.model import families, row_order
from layerskip.model.files import difference
from layerskip.model.files.rounding import CALIBRATED, Rounding
from layerskip.model.files.weights import missing
from layerskip.model.quantize import EMBEDDING_BITS, check_groups, on_grid

WINDOW = 512  # tokens; a longer text gives more of them
WINDOWS = 40  # at most
# Of a difference. With more, `encode` may find other scales in what was made; nearest levels do there.
MOST_COMPENSATED_BITS = 2
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
        with _rounding(model, lambda _, weight, hessian: compensated(weight, hessian), progress):
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


def calibrate_difference(
    source: Source,
    base: Source,
    tokens: Sequence[int],
    bits_of: Callable[[str], int],
    progress: Progress = lambda done, total: None,
) -> dict[str, dict[str, Tensor]]:
    """What training changed, on the levels of a difference, so that outputs change little.

    The head sees what leaves the last layer and, where the checkpoint names one, its exit layer.

    Args:
        source: a whole model.
        base: what training began with, of the same shape.
        tokens: the calibration text; the first `WINDOW * WINDOWS` are used.
        bits_of: name of a matrix -> bits that its difference gets.
        progress: called with the layers done and their number.

    Returns:
        name -> the file's tensors for its change (`difference.to_stored`), of every matrix in a layer
        and of the head that gets so few bits that it is not left to the nearest level.

    Raises:
        ValueError: the text is too short.
    """
    windows = _windows(source, tokens)
    model = _model(source)
    made: dict[str, dict[str, Tensor]] = {}

    def rounded(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        before = row_order.read(base.files, name, "halves").float()
        change, bits = weight - before, bits_of(name)
        if bits <= MOST_COMPENSATED_BITS:
            change = compensated(change, hessian, levels_of(bits), difference.BLOCK)
            made[name] = difference.to_stored(name, change, bits)
        else:
            change = difference.rounded(change, bits)
        return (before + change).to(torch.bfloat16).float()  # as merged

    with torch.no_grad():
        head = model.get_output_embeddings()
        hessian = _of_exits(model, windows, source.files.settings.exit_layer)
        if head.weight is model.get_input_embeddings().weight:
            # Its rows are looked up as well, where an error in any direction counts.
            hessian.diagonal().add_(hessian.diagonal().mean())
        head.weight.copy_(rounded(_names(model)[head.weight], head.weight, hessian))
        with _rounding(model, rounded, progress):
            model(windows, use_cache=False, logits_to_keep=1)
    return made


def _of_exits(model: Any, windows: Tensor, exit_layer: int | None) -> Tensor:
    """Sum of x xT over what the head gets from the last layer and from the exit, where there is one."""
    total = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    for window in windows:
        found = model.model(window[None], use_cache=False, output_hidden_states=True)
        seen = [found.last_hidden_state[0]]
        if exit_layer not in (None, len(model.model.layers)):
            seen.append(model.model.norm(found.hidden_states[exit_layer])[0])
        for x in seen:
            total += x.T @ x
    return total


def _names(model: Any) -> dict[Tensor, str]:
    """What the model calls its parameters; a head that is the embedding by the embedding's name."""
    return {parameter: name for name, parameter in model.named_parameters()}


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
def _rounding(
    model: Any, rounded: Callable[[str, Tensor, Tensor], Tensor], progress: Progress
) -> Iterator[None]:
    """While this lasts, the first call of a layer rounds it before it answers.

    `rounded` is given a matrix's name, the matrix, and the sum of x xT over its inputs.
    """
    layers, names = model.model.layers, _names(model)

    def first_call(number: int, layer: nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        with _hessians(linears) as hessians:
            plain(*args, **kwargs)
        for linear in linears:
            weight = linear.weight
            weight.copy_(rounded(names[weight], weight, hessians[linear]))
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
