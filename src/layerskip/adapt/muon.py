"""Muon (Jordan et al., 2024): gradient descent with momentum whose updates are made orthogonal."""

from collections.abc import Iterable

import torch
from torch import Tensor

_MOMENTUM = 0.95
_STEPS = 5
_COEFFICIENTS = 3.4445, -4.775, 2.0315  # of Jordan et al.; singular values come near 1
_RMS = 0.2  # root mean square of an update, as of AdamW's: arXiv 2502.16982, equation 4


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices; it takes AdamW's learning rate and weight decay.

    `torch.optim.Muon` computes the same in bfloat16, which takes dozens of times as long on CPUs
    without bfloat16 instructions; this one computes in float32.

    Args:
        parameters: matrices.
        lr: learning rate.
        weight_decay: of the parameters, decoupled.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            lr, weight_decay = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
                update = orthogonal(gradient.lerp(momentum, _MOMENTUM))
                parameter.mul_(1 - lr * weight_decay)
                parameter.sub_(update, alpha=lr * _RMS * max(parameter.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors whose singular values are about 1.

    By Newton-Schulz iterations.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
