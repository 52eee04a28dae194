"""What a layer does after attention. Each kind is called like a `Linear`: input, and a residual."""

import functools
from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from layerskip.model.architecture import Activation
from layerskip.model.linear import Linear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class GatedMLP:
    """down(activation(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self.gate_up, self.down = gate_up, down
        self.activation = ACTIVATIONS[activation]

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.gate_up.weight_bytes + self.down.weight_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, D] (and a residual [N, D]) to [N, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, residual)
