"""Rounding errors that make up for each other: GPTQ (arXiv 2210.17323) on the 4-bit grid.

Columns are rounded one after the other; what the rounding of one does to the layer's output is taken
back, as far as the inputs allow, by changing those that are still to come (eq. 2 and 3 there, with
the Cholesky factor of section 3.3). torchao's GPTQ runs on CUDA alone, and on grids of its own.
"""

import torch
from torch import Tensor

from layerskip.model.quantize import GROUP, no_zero, quantize

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
