"""Quantization-aware training: weights are rounded to a grid wherever they are used.

The grid is that of inference in 8 or 4 bits, or that of a difference (`export --to difference`): what
training changed in the weights that it began with, in 2 bits.

The float32 weights behind it are what the optimizer changes and checkpoints hold, under their usual
names; rounding passes gradients straight through (arXiv 1308.3432). Loading the result with the same
weights, or exporting the difference, rounds to exactly the numbers that were trained.

torchao's fake quantization cannot lay out this grid (it rounds the middle of a group's range where
ours has its least value in float16), and `torch.nn.utils.parametrize` renames the weights in
checkpoints. So the forward
of the modules is replaced on the instance, as `recipe.attach` does it with layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.model.files import difference
from layerskip.model.quantize import EMBEDDING_BITS, bits_of, check_groups, on_grid
from layerskip.recipe.anatomy import Anatomy, find_anatomy, transformers_model

DIFFERENCE = "difference"
Grid = Callable[[Tensor, "Tensor | None"], Tensor]
"""A matrix, or those of its rows that the second tensor names, to the nearest numbers of its grid."""


def quantize_aware(
    model: nn.Module, weights: str, before: Mapping[str, Tensor] | None = None
) -> QuantizeAware:
    """From now on a causal LM of transformers computes with weights that are rounded to a grid.

    Linear layers of the decoder's layers get 8 or 4 bits, embedding and head 8; of a difference all of
    them get 2 bits beside the weights before. Training and evaluation alike; before or after `attach`,
    before the model is wrapped.

    Args:
        model: the causal LM.
        weights: "int8", "int4" or "difference".
        before: of a difference: the weights that it will be added to, by the model's names.

    Returns:
        The handle that ends it.

    Raises:
        ValueError: other weights, an adapter on the model, matrices of its layers that are not those
            of linear layers (mixtures of experts), or that cannot be cut into groups; weights before
            that are of another shape.
    """
    bits = None if weights == DIFFERENCE else bits_of(weights)
    if bits is None and weights != DIFFERENCE:
        raise ValueError(
            "weights of 16 bits have no grid; to train for there are int8, int4, difference"
        )
    plain_model = transformers_model(model)
    if getattr(plain_model, "peft_config", None):
        raise ValueError("an adapter cannot be trained on a grid: merging it takes weights off it")
    anatomy = find_anatomy(plain_model)
    linears = list(_linears(anatomy))
    embedding, head = plain_model.get_input_embeddings(), anatomy.head
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{type(plain_model).__name__} has no plain embedding and head to quantize"
        )
    grids: dict[nn.Module, Grid] = {}
    names = {parameter: name for name, parameter in plain_model.named_parameters()}
    matrices: list[nn.Linear | nn.Embedding] = [*linears, embedding, head]
    for module in matrices:
        weight: Any = module.weight
        if bits is None:
            grids[module] = _grid_around(before or {}, names[weight], weight)
        else:
            check_groups(weight.shape)
            grids[module] = _grid_of_bits(bits if module in linears else EMBEDDING_BITS)
    return QuantizeAware(plain_model, head, grids)


def _grid_of_bits(bits: int) -> Grid:
    return lambda weight, rows: on_grid(weight, bits)


def _grid_around(before: Mapping[str, Tensor], name: str, weight: Tensor) -> Grid:
    if name not in before or before[name].shape != weight.shape:
        raise ValueError(f"what a difference is added to has no {name} of {tuple(weight.shape)}")
    start = before[name].detach().float()

    def nearest(weight: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal start
        start = start.to(weight.device)  # a Trainer moves the model after this is set up
        own = start if rows is None else start[rows]
        return own + difference.rounded(weight - own, difference.BITS)

    return nearest


class QuantizeAware:
    """Rounding on a model; `quantize_aware` makes it."""

    def __init__(self, model: nn.Module, head: nn.Linear, grids: Mapping[nn.Module, Grid]) -> None:
        self._modules = list(grids)
        for module, grid in grids.items():
            forward: Any = _linear_forward
            if isinstance(module, nn.Embedding):
                forward = _embedding_forward
            elif module is head:
                forward = self._head_forward
            replacement = functools.partial(forward, module, grid)
            module.forward = functools.wraps(module.forward)(replacement)
        # The exit loss calls the head once for every chunk of tokens: it is rounded once a pass.
        self._in_pass = False
        self._head_values: Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin_pass),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]

    def remove(self) -> None:
        """Compute with the weights as they are again."""
        for module in self._modules:
            del module.forward
        for hook in self._hooks:
            hook.remove()

    def _head_forward(self, head: nn.Linear, grid: Grid, hidden: Tensor) -> Tensor:
        values = self._head_values
        # In float16 the exit loss calls the head outside autocast, the model's own forward inside.
        if values is None or values.dtype != _product_dtype(head.weight):
            values = _rounded(head.weight, grid)
        if self._in_pass:
            self._head_values = values
        return functional.linear(hidden, _straight_through(head.weight, values), head.bias)

    def _begin_pass(self, *_: Any) -> None:
        self._in_pass, self._head_values = True, None

    def _end_pass(self, *_: Any) -> None:
        self._in_pass, self._head_values = False, None


def _linears(anatomy: Anatomy) -> Iterator[nn.Linear]:
    for number, layer in enumerate(anatomy.layers):
        for module in layer.modules():
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if isinstance(module, nn.Linear):
                yield module
            elif matrices:
                raise ValueError(
                    f"a {type(module).__name__} in layer {number} is no linear layer; "
                    "quantize_aware trains models whose layers have no other matrices"
                )


def _linear_forward(linear: nn.Linear, grid: Grid, x: Tensor) -> Tensor:
    weight = _straight_through(linear.weight, _rounded(linear.weight, grid))
    return functional.linear(x, weight, linear.bias)


def _embedding_forward(embedding: nn.Embedding, grid: Grid, tokens: Tensor) -> Tensor:
    """Only the rows that are looked up are rounded: no group reaches from one row into another."""
    rows = functional.embedding(tokens, embedding.weight, embedding.padding_idx)
    values = grid(rows.detach().flatten(0, -2), tokens.flatten()).view_as(rows).to(rows.dtype)
    hidden = _straight_through(rows, values)
    scale = getattr(embedding, "embed_scale", None)  # Gemma 3
    return hidden if scale is None else hidden * scale.to(hidden.dtype)


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    """On the grid, in the dtype of the product that follows: autocast keeps no cast of it."""
    return grid(weight.detach(), None).to(_product_dtype(weight))


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def _straight_through(weight: Tensor, values: Tensor) -> Tensor:
    return _StraightThrough.apply(weight, values)


class _StraightThrough(torch.autograd.Function):
    """Gives `values`, and their gradient to `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
