"""What a layer does after attention. Each kind is called like a `Linear`: input, and a residual."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.architecture import Activation
from layerskip.model.linear import Linear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class MLP:
    """down(activation(up(x))), or gated down(activation(gate(x)) * up(x)).

    `gate_up` is one product that gives gate and up side by side, or up alone.
    """

    def __init__(
        self, gate_up: Linear, down: Linear, activation: Activation, *, is_gated: bool
    ) -> None:
        self.gate_up, self.down, self.is_gated = gate_up, down, is_gated
        self.activation = ACTIVATIONS[activation]

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.gate_up.weight_bytes + self.down.weight_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, D] (and a residual [N, D]) to [N, D]."""
        if not self.is_gated:
            return self.down(self.activation(self.gate_up(x)), residual)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, residual)


class Experts:
    """A mixture of experts: each row is answered by the `top_k` MLPs that the router prefers.

    An expert computes the rows that were sent to it and no others. How many they are has to be known
    on the host, so an accelerator waits once a layer.
    """

    def __init__(
        self, router: Linear, experts: Sequence[Linear], top_k: int, normalized: bool
    ) -> None:
        self.router, self.experts = router, experts
        self.top_k, self.normalized = top_k, normalized

    @property
    def weight_bytes(self) -> int:
        """Bytes that one row has to read: the router and `top_k` experts."""
        return self.router.weight_bytes + self.top_k * self.experts[0].weight_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, D] (and a residual [N, D]) to [N, D]."""
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        shares, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        shares, chosen = shares.flatten(), chosen.flatten()
        order = chosen.argsort(stable=True)  # by expert, and of each the rows in their order
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        # The residual comes last: in 16 bits it would swallow small parts.
        out = torch.zeros_like(x)
        for expert, sent in zip(self.experts, order.split(counts), strict=True):
            if len(sent):
                rows = sent // self.top_k
                out.index_add_(0, rows, (expert(x[rows]) * shares[sent, None]).to(x.dtype))
        return out if residual is None else residual + out
