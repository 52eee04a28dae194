"""What drafted tokens were drawn from: a distribution over all tokens where one is asked for."""

import dataclasses

import torch
from torch import Tensor

from layerskip.decoding.short_head import ReducedHead
from layerskip.model import Distributions


@dataclasses.dataclass(frozen=True)
class DrawnFrom:
    """The distributions q of a draft's tokens, kept as they were made.

    An early exit knows the tokens of its head alone, and n-grams behind its tokens, or in their place,
    could be nothing else. Of all tokens they are needed after a rejection, one a round, and to write
    them down takes a small model as long as some of its layers.

    Attributes:
        tokens: [B, d] int64, the drafted ones.
        vocab_size: V.
        exits: of each of the first m tokens, which an early exit drafted, over n tokens.
        chosen: which of the n each is, [B, 1] int64.
        head: whose n tokens they are; None = all V.
    """

    tokens: Tensor
    vocab_size: int
    exits: tuple[Distributions, ...] = ()
    chosen: tuple[Tensor, ...] = ()
    head: ReducedHead | None = None

    @property
    def chances(self) -> Tensor:
        """How likely each drafted token was, [B, d] float32."""
        certain = torch.ones(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.exits:
            pairs = zip(self.exits, self.chosen, strict=True)
            found = [exit_.of(0, chosen) for exit_, chosen in pairs]
            certain[:, : len(self.exits)] = torch.cat(found, dim=1)
        return certain

    def chance(self, row: int, i: int, token: int) -> float:
        """How likely any token was in a row's i-th place."""
        if i >= len(self.exits):
            return float(token == self.tokens[row, i])
        at = token if self.head is None else self.head.position(token)
        return 0.0 if at is None else self.exits[i].chance(row, 0, at)

    def __getitem__(self, at: tuple[int, int]) -> Tensor:
        """The distribution of a row's i-th token, [V]."""
        row, i = at
        if i >= len(self.exits):
            return self._certain(self.tokens[row, i : i + 1])[0]
        q = self.exits[i][row, 0]
        return q if self.head is None else self.head.spread(q)

    @property
    def whole(self) -> Tensor:
        """All of them, [B, d, V]."""
        certain = self._certain(self.tokens[:, len(self.exits) :])
        if not self.exits:
            return certain
        q = torch.cat([exit_[:, :] for exit_ in self.exits], dim=1)
        return torch.cat([q if self.head is None else self.head.spread(q), certain], dim=1)

    def _certain(self, tokens: Tensor) -> Tensor:
        """1 at each of the tokens [...], [..., V]."""
        shape = (*tokens.shape, self.vocab_size)
        nowhere = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        return nowhere.scatter_(-1, tokens[..., None], 1.0)
