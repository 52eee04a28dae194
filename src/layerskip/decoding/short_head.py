"""A draft head for the tokens that matter: on a small model the head costs as much as many layers.

Only drafts are scored with it; verification uses the whole vocabulary, so nothing is lost but drafts of
rare tokens (FR-Spec, arXiv 2502.14856). Tokens outside have probability 0 in the draft's distribution,
which is the one that acceptance looks at.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from layerskip.model import Decoder


class ShortHead:
    """The shared exit cut down to some tokens.

    Args:
        decoder: whose final norm and head these are.
        token_ids: the tokens kept, in any order; repeated ones count once.

    Attributes:
        decoder: the same decoder with the short head.
    """

    def __init__(self, decoder: Decoder, token_ids: Iterable[int]) -> None:
        self._kept = torch.tensor(sorted(set(token_ids)), device=decoder.device)
        self.decoder = decoder.with_short_head(self._kept)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, D] to logits [B, T, V]: minus infinity for tokens outside."""
        kept = self.decoder.logits(hidden)
        full = kept.new_full((*kept.shape[:-1], self.decoder.architecture.vocab_size), -torch.inf)
        full[..., self._kept] = kept
        return full
