"""The softmax of the compiled kernels: logits as they are, and what each block of them weighs."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.model.distributions import NO_NUMBERS, Distributions, Draws, shares
from layerskip.model.native.build import library
from layerskip.model.native.panels import FLOATS, PanelMatrix, pointer_to

_BLOCK = 256  # as in `kernels.cpp`
NO_DRAWING = (None, 0.0, None, None, None, None)  # what `layerskip_step` is given where it chooses


class BlockSoftmax(Distributions):
    """The softmax of some logits by a temperature, of which no more is worked out than is asked for.

    To divide all weights by their sum and write them down takes a small model as long as a layer, and a
    draw from them that looks at all of them takes longer.

    Args:
        heads: whose logits they are, one after the other.
        pointers: see `panels.pointers_to`.
        rows: B.
        positions: T of each.
        temperature: above 0.

    Attributes:
        arguments: of the kernels that fill it in: the temperature, and where what they find goes.
    """

    looked_up = True

    def __init__(
        self,
        heads: Sequence[PanelMatrix],
        pointers: ctypes.Array[ctypes.c_void_p],
        rows: int,
        positions: int,
        temperature: float,
    ) -> None:
        self._heads, self._pointers, self._temperature = heads, pointers, temperature
        sizes = [head.shape[0] for head in heads]
        self._logits = torch.empty(rows, positions, sum(sizes), **FLOATS)
        n_blocks = sum(-(-size // _BLOCK) for size in sizes)
        self._blocks = torch.empty(rows, positions, n_blocks, **FLOATS)
        whole = torch.empty(rows, positions, 2, **FLOATS)
        places = (x.data_ptr() for x in (self._logits, self._blocks, whole))
        self.arguments = (temperature, *places)
        # NumPy looks one number up in a tenth of the time that PyTorch takes.
        self._found, self._whole = self._logits.numpy(), whole.numpy()

    def __getitem__(self, at: Any) -> Tensor:
        """See `Distributions`."""
        whole = torch.from_numpy(self._whole)[at]
        logits = self._logits[at] - whole[..., :1]
        return (logits / self._temperature).exp_().div_(whole[..., 1:])

    def of(self, i: int, tokens: Tensor) -> Tensor:
        """See `Distributions`."""
        chances = [[self.chance(row, i, token)] for row, (token,) in enumerate(tokens.tolist())]
        return torch.tensor(chances, **FLOATS)

    def draw(self, i: int, share: Tensor) -> Tensor:
        """See `Distributions`."""
        drawn = [[self.pick(row, i, part)] for row, (part,) in enumerate(share.tolist())]
        return torch.tensor(drawn, device="cpu")

    def chance(self, row: int, i: int, token: int) -> float:
        """How likely a token is."""
        top, total = self._whole[row, i].tolist()
        return math.exp((float(self._found[row, i, token]) - top) / self._temperature) / total

    def pick(self, row: int, i: int, share: float) -> int:
        """The token of one row, as `draw` finds it."""
        found: int = library().layerskip_draw(
            *(self._pointers, len(self._pointers)),
            *(pointer_to(self._logits, row, i), pointer_to(self._blocks, row, i)),
            *(self._whole[row, i, 0], self._temperature, share),
        )
        if found < 0:
            raise ValueError(NO_NUMBERS)
        return found


class Drawing:
    """What `layerskip_step` draws by, and what has to live while it does: nothing without draws.

    Args:
        heads: see `BlockSoftmax`.
        pointers: see there.
        draws: to which what is drawn is added.
        rows: B, of one position each.

    Attributes:
        arguments: of the kernel.
    """

    def __init__(
        self,
        heads: Sequence[PanelMatrix],
        pointers: ctypes.Array[ctypes.c_void_p],
        draws: Draws | None,
        rows: int,
    ) -> None:
        self.arguments: tuple[int | float | None, ...] = NO_DRAWING
        self._drawn = None
        if draws is not None:
            self._share = shares(rows, torch.device("cpu"), draws.generator)
            self._drawn = torch.empty(rows, 1, dtype=torch.int64, device="cpu")
            found = BlockSoftmax(heads, pointers, rows, 1, draws.temperature)
            draws.drawn.append((found, self._drawn))
            self.arguments = (
                self._share.data_ptr(),
                *found.arguments,
                self._drawn.data_ptr(),
            )

    @property
    def failed(self) -> bool:
        """Whether what a row was to be drawn from is no number."""
        return self._drawn is not None and any(token < 0 for (token,) in self._drawn.tolist())
