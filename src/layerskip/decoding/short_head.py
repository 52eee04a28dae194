"""A draft head for the tokens that matter: on a small model the head costs as much as many layers.

Only drafts are scored with it; verification uses the whole vocabulary, so nothing is lost but drafts of
rare tokens (FR-Spec, arXiv 2502.14856). Tokens outside have probability 0 in the draft's distribution,
which is the one that acceptance looks at.
"""

import copy
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from layerskip.model import Decoder

# The last lists of each decoder and their heads: answers of one model share them.
_MADE: "weakref.WeakKeyDictionary[Decoder, tuple[tuple[tuple[int, ...], ReducedHead], ...]]" = (
    weakref.WeakKeyDictionary()
)
_KEPT = 8  # a benchmark has rows of several lists in turns


class ReducedHead:
    """The shared exit cut down to some tokens.

    Args:
        decoder: whose final norm and head these are.
        token_ids: the tokens kept, in any order; repeated ones count once.

    Attributes:
        token_ids: [n] int64, which token each logit is of.
        short: the decoder with this head, whose logits are [B, T, n] (see `Decoder.with_short_head`).
    """

    def __init__(self, decoder: Decoder, token_ids: Iterable[int]) -> None:
        known = frozenset(token_ids)
        self._known: tuple[frozenset[int], ...] = (known,)
        self.token_ids = torch.tensor(sorted(known), device=decoder.device)
        self._vocab_size = decoder.architecture.vocab_size
        self.short = decoder.with_short_head(self.token_ids)

    @classmethod
    def of(
        cls, decoder: Decoder, token_ids: tuple[int, ...] | None, prompt: Iterable[int]
    ) -> "ReducedHead | None":
        """The head for a list of tokens and those of a prompt; None, the whole one, without a list.

        The list's part is made once, as long as few others are asked for in between.
        """
        if token_ids is None:
            return None
        made = _MADE.get(decoder, ())
        head = next((h for ids, h in made if ids is token_ids or ids == token_ids), None)
        if head is None:
            head = cls(decoder, token_ids)
            _MADE[decoder] = ((token_ids, head), *made)[:_KEPT]
        return head.also(decoder, prompt)

    def also(self, decoder: Decoder, token_ids: Iterable[int]) -> "ReducedHead":
        """The same with more tokens, whose rows alone are new: a second, small product.

        Args:
            decoder: the whole one, which this head was made from.
            token_ids: those that are in it already add nothing.
        """
        new = frozenset(token_ids).difference(*self._known)
        if not new:
            return self
        more, both = ReducedHead(decoder, new), copy.copy(self)
        both._known = (*self._known, new)
        both.token_ids = torch.cat([self.token_ids, more.token_ids])
        both.short = self.short.beside(more.short)
        return both

    @property
    def share(self) -> float:
        """Of the whole head's tokens."""
        return len(self.token_ids) / self._vocab_size

    def position(self, token: int) -> int | None:
        """Which logit is a token's; None where it is not kept."""
        found = (self.token_ids == token).nonzero()
        return int(found[0]) if len(found) else None

    def spread(self, probabilities: Tensor) -> Tensor:
        """Probabilities of the tokens kept [..., n] as those of all tokens [..., V]."""
        whole = probabilities.new_zeros(*probabilities.shape[:-1], self._vocab_size)
        whole[..., self.token_ids] = probabilities
        return whole
