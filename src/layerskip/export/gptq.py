"""Rounding errors that make up for each other: GPTQ (arXiv 2210.17323) on our grids.

Columns are rounded one after the other; what the rounding of one does to the layer's output is taken
back, as far as the inputs allow, by changing those that are still to come (eq. 2 and 3 there, with
the Cholesky factor of section 3.3). torchao's GPTQ runs on CUDA alone, and on grids of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from layerskip.model.files import difference
from layerskip.model.quantize import GROUP, no_zero, quantize

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
_TOP = 15
Rounding = Callable[[Tensor, int], Tensor]
"""A column [out] of a group, and its number there, to points of the group's grid."""


def four_bits(group: Tensor) -> Rounding:
    """The 4-bit grid of a group [out, GROUP].

    The least and the greatest weight keep the ends of the grid, so that `quantize` finds the same grid
    in the result: it gives back these numbers.
    """
    grid = quantize(group, 4)
    scales, offsets = grid.scales.float()[:, 0], grid.float_offsets()[:, 0]
    divisors = no_zero(scales)
    least, greatest = group.argmin(1), group.argmax(1)

    def rounded(column: Tensor, number: int) -> Tensor:
        codes = ((column - offsets) / divisors).round_().clamp_(0, _TOP)
        codes.masked_fill_(least == number, 0)
        codes.masked_fill_((greatest == number) & (least != number), _TOP)
        return codes * scales + offsets

    return rounded


def levels_of(bits: int) -> Callable[[Tensor], Rounding]:
    """The levels of a block [out, BLOCK] of a difference, which `difference.encode` finds again."""

    def rounding(block: Tensor) -> Rounding:
        scales = difference.scales_of(block, bits)
        return lambda column, _: difference.nearest(column, scales, bits)

    return rounding


def compensated(
    weight: Tensor,
    hessian: Tensor,
    grid_of: Callable[[Tensor], Rounding] = four_bits,
    size: int = GROUP,
) -> Tensor:
    """The weight on a grid, so that the layer's output on its inputs changes little.

    Args:
        weight: [out, in], float32.
        hessian: [in, in], sum of x xT over inputs x, float32.
        grid_of: the grid of a group, as the compensation has left it.
        size: columns of a group; the last may be narrower.

    Returns:
        [out, in], float32.
    """
    factor = _factor(hessian)
    left = weight.clone()  # columns rounded so far; the others as the compensation has them
    for start in range(0, weight.shape[1], size):
        stop = min(start + size, weight.shape[1])
        errors = _round_group(left[:, start:stop], factor[start:stop, start:stop], grid_of)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left


def _round_group(group: Tensor, factor: Tensor, grid_of: Callable[[Tensor], Rounding]) -> Tensor:
    """Round a group [out, n] in place; the errors to be compensated, [out, n]."""
    rounded = grid_of(group)
    errors = torch.empty_like(group)
    for j in range(group.shape[1]):
        column = group[:, j]
        values = rounded(column, j)
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
