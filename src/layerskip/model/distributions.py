"""What tokens are drawn from, and the drawing; a few numbers of many are asked for."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Numbers = npt.NDArray[Any]
_BLOCK = 1024  # weights whose running sum is cheap
NON_FINITE_MESSAGE = (
    "this model's results are not finite (nan or infinite): take another dtype, such as bfloat16"
    " in place of float16, or its weights are damaged"
)


class Distributions:
    """Distributions over V tokens after each of T positions of B rows.

    Args:
        probabilities: [B, T, V] float32.

    Attributes:
        looked_up: whether a few numbers are had for less than a whole distribution.
    """

    looked_up = False

    def __init__(self, probabilities: Tensor) -> None:
        self._probabilities = probabilities

    def __getitem__(self, at: Any) -> Tensor:
        """Those of some rows and positions, as a tensor's [B, T] would be indexed."""
        return self._probabilities[at]

    def of(self, i: int, tokens: Tensor) -> Tensor:
        """How likely tokens [B, 1] are at position i, [B, 1]."""
        return self[:, i].gather(1, tokens)

    def chance(self, row: int, i: int, token: int) -> float:
        """How likely a row's token is at position i."""
        return float(self[row, i][token])

    def highest(self, i: int) -> Tensor:
        """How likely the most likely token of all rows is at position i: a number."""
        return self[:, i].amax()

    def pick(self, row: int, i: int, share: float) -> int:
        """`draw`, of one row."""
        return _in_block(self[row, i].numpy(), share)

    def draw(self, i: int, share: Tensor) -> Tensor:
        """The token of each row at position i where probabilities, added up, pass a share.

        Args:
            i: the position.
            share: [B, 1] float64, from 0 to below 1, of their sum.

        Returns:
            [B, 1] int64.

        Raises:
            ValueError: probabilities are no numbers (not on a GPU, where the token is then any).
        """
        return pick(self[:, i], share)

    def or_any(self) -> "Distributions":
        """The same where they are numbers; where not, all tokens are as likely as each other."""
        return Distributions(self[:, :].nan_to_num(1.0))


@dataclasses.dataclass(frozen=True)
class Draws:
    """The drawing of one token of each row after the other.

    Attributes:
        temperature: above 0.
        generator: source of randomness, on the rows' device.
        drawn: what each was drawn from, and which of its tokens it is, [B, 1].
    """

    temperature: float
    generator: torch.Generator | None
    drawn: list[tuple[Distributions, Tensor]] = dataclasses.field(default_factory=list)

    def next(self, found: Distributions, like: Tensor) -> Tensor:
        """The next token of each row, [B, 1]; `like`: [B, T], of the same rows and device."""
        chosen = found.draw(0, shares(len(like), like.device, self.generator))
        self.drawn.append((found, chosen))
        return chosen


def shares(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """One random number for each of n rows, [n, 1] float64 from 0 to below 1."""
    return torch.rand(n, 1, dtype=torch.float64, device=device, generator=generator)


def pick(weights: Tensor, share: Tensor) -> Tensor:
    """Where the running sum of each row of weights [B, V] passes a share [B, 1] of it: [B, 1] int64.

    Weights need not sum to 1; see `Distributions.draw`.
    """
    passed = _in_blocks if weights.device.type == "cpu" else _at_once
    return passed(weights, share)


def _at_once(weights: Tensor, share: Tensor) -> Tensor:
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    whole = sums[:, -1:].contiguous()
    passed = torch.searchsorted(sums, share * whole, right=True)
    # A share that is rounded up to the whole is the last token that has a weight.
    return torch.minimum(passed, torch.searchsorted(sums, whole)).clamp_(max=weights.shape[-1] - 1)


def _in_blocks(weights: Tensor, share: Tensor) -> Tensor:
    """The same on a CPU, of less than all: running sums of a vocabulary take as long as a layer."""
    pairs = zip(weights.numpy(), share[:, 0].tolist(), strict=True)
    return torch.tensor([[_in_block(row, its_share)] for row, its_share in pairs], device="cpu")


def _in_block(weights: _Numbers, share: float) -> int:
    whole = len(weights) // _BLOCK * _BLOCK
    blocks = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    block, share = _passed(np.append(blocks, weights[whole:].sum()), share)
    return block * _BLOCK + _passed(weights[block * _BLOCK :][:_BLOCK], share)[0]


def _passed(weights: _Numbers, share: float) -> tuple[int, float]:
    """Which of the weights is at a share of their sum, and at what share of it."""
    sums = weights.cumsum(dtype=np.float64)
    whole = sums[-1]
    if not whole > 0:
        raise ValueError(NON_FINITE_MESSAGE)
    wanted = share * whole
    at = int(min(sums.searchsorted(wanted, side="right"), sums.searchsorted(whole)))
    before = sums[at - 1] if at else 0.0
    return at, float((wanted - before) / (sums[at] - before))
