"""What drafted tokens were drawn from: a distribution over all tokens where one is asked for."""

import dataclasses

import torch
from torch import Tensor

from layerskip.decoding.short_head import ShortHead


@dataclasses.dataclass(frozen=True)
class DrawnFrom:
    """The distributions q of a draft's tokens, kept as they were made.

    An early exit knows the tokens of its head alone, and n-grams behind its tokens, or in their place,
    could be nothing else. Of all tokens they are needed after a rejection, one a round, and to write
    them down takes a small model as long as some of its layers.

    Attributes:
        tokens: [B, d] int64, the drafted ones.
        vocab_size: V.
        exits: of each of the first m tokens, which an early exit drafted, [B, 1, n] float32.
        chosen: which of the n each is, [B, 1] int64.
        head: whose n tokens they are; None = all V.
    """

    tokens: Tensor
    vocab_size: int
    exits: tuple[Tensor, ...] = ()
    chosen: tuple[Tensor, ...] = ()
    head: ShortHead | None = None

    @property
    def chances(self) -> Tensor:
        """How likely each drafted token was, [B, d] float32."""
        certain = torch.ones(self.tokens.shape, dtype=torch.float32, device=self.tokens.device)
        if self.exits:
            chosen = torch.stack(self.chosen, dim=1)
            found = torch.cat(self.exits, dim=1).gather(2, chosen)[..., 0]
            certain[:, : len(self.exits)] = found
        return certain

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
        q = torch.cat(self.exits, dim=1)
        return torch.cat([q if self.head is None else self.head.spread(q), certain], dim=1)

    def _certain(self, tokens: Tensor) -> Tensor:
        """1 at each of the tokens [...], [..., V]."""
        shape = (*tokens.shape, self.vocab_size)
        nowhere = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        return nowhere.scatter_(-1, tokens[..., None], 1.0)
