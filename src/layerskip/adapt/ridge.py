"""Ridge regression of the adapter's projection: a first guess of h_L that needs seconds.

A copy of the last layer without it begins at a loss of about 20 and stays a bigram model.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from layerskip.adapt.network import shifted
from layerskip.model.exit_adapter import joined, normalized

_PENALTY = 1e-3  # of the mean square of an input, which is 1


def fit_projection(sequences: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Fit normalized states of layer L to those of layer E here and of layer L one position back.

    Args:
        sequences: states leaving layer E and layer L, each [T, D].

    Returns:
        [D, 2 D] float32.
    """
    covariance = products = None
    n = 0
    for exit_states, last_states in sequences:
        inputs = joined(exit_states, shifted(last_states[None])[0])[1:].double()
        targets = normalized(last_states)[1:].double()
        covariance = inputs.T @ inputs + (0.0 if covariance is None else covariance)
        products = inputs.T @ targets + (0.0 if products is None else products)
        n += len(inputs)
    assert covariance is not None
    assert products is not None
    covariance += _PENALTY * n * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.solve(covariance, products).T.float().contiguous()
