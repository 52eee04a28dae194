"""Where drafts come from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from layerskip.decoding.draft_length import DraftLength
from layerskip.decoding.sampling import Sampling, TokenHistory, pick
from layerskip.model import Decoder, KVCache


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposed tokens, and what verification needs to know of how they came about.

    Attributes:
        tokens: [B, d] int64.
        probabilities: [B, d, V] float32, the distributions that they were drawn from; None if
            greedy or d = 0.
        exit_states: [B, d + 1, D], the hidden states that left layer E at the position before each
            drafted token and at the last drafted token: what layers [E, L) start from.
        source: the drafter's name.
    """

    tokens: Tensor
    probabilities: Tensor | None
    exit_states: Tensor
    source: str


class Drafter(Protocol):
    """Proposes tokens and runs the first E layers over them."""

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """Learn what the answer has become, and how many of the last drafts it has.

        Called with every token once, before the next draft.
        """

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> Draft:
        """Draft up to n tokens after `last`, and run the first E layers over the last of them too.

        Args:
            last: [B, 1], the newest settled token, which no layer has seen yet.
            n: how many tokens to draft at most, 0 or more.
            cache: its lengths are moved on by d + 1.
            history: for the repetition penalty, or None.
            generator: source of randomness for sampling.
        """
        ...


class EarlyExitDrafter:
    """Drafts with the first E layers and an exit (section 4.3 of the paper).

    Args:
        decoder: the model.
        exit_layer: E.
        sampling: of the answer.
        head: the exit: hidden states [B, T, D] to logits [B, T, V]; None = the decoder's own.
        length: decides how far to draft; None = as far as is asked for. For one row only.
    """

    source = "early-exit"

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int,
        sampling: Sampling,
        head: Callable[[Tensor], Tensor] | None = None,
        length: DraftLength | None = None,
    ) -> None:
        self.decoder, self.exit_layer, self.sampling = decoder, exit_layer, sampling
        self.head, self.length = head or decoder.logits, length

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """The cache has the tokens; how many were right teaches how far to draft."""
        if self.length is not None:
            self.length.learn(accepted)

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> Draft:
        """See `Drafter`."""
        states: list[Tensor] = []
        chosen_from: list[Tensor] = []
        tokens = last
        if self.length is not None and not self.length.begins():
            n = 0
        for i in range(n + 1):
            hidden = self.decoder.embed(tokens[:, -1:])
            states.append(self.decoder.run(hidden, 0, self.exit_layer, cache))
            cache.lengths += 1
            if i == n:
                break
            seen = None if history is None else history.before(tokens[:, 1:])[:, -1:]
            logits = self.sampling.penalize(self.head(states[-1]), seen)
            token, q = pick(logits, self.sampling, generator)
            if self.length is not None and not self.length.keeps(_probability(token, q, logits)):
                break
            tokens = torch.cat([tokens, token], dim=1)
            if q is not None:
                chosen_from.append(q)
        return Draft(
            tokens=tokens[:, 1:],
            probabilities=torch.cat(chosen_from, dim=1) if chosen_from else None,
            exit_states=torch.cat(states, dim=1),
            source=self.source,
        )


def _probability(token: Tensor, q: Tensor | None, logits: Tensor) -> float:
    """What the draft gives to the token that it chose, [1, 1] of [1, 1, V]."""
    if q is None:
        q = logits.float().softmax(dim=-1)
    return float(q[0, 0, token[0, 0]])
