"""Where drafts come from."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from layerskip.decoding.draft_length import DraftLength
from layerskip.decoding.sampling import Sampling, TokenHistory, pick
from layerskip.decoding.short_head import ShortHead
from layerskip.model import Decoder, KVCache


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposed tokens, and what verification needs to know of how they came about.

    Attributes:
        tokens: [B, d] int64.
        probabilities: [B, d, V] float32, the distributions that they were drawn from; None if
            greedy or d = 0.
        states: [B, d + 1, D], the hidden states that enter layer `start` at the position before each
            drafted token and at the last drafted token: what verification starts from.
        start: how many layers have seen these positions: E where the early exit drafted, else 0.
        source: the drafter's name, or "model" where nothing was drafted.
    """

    tokens: Tensor
    probabilities: Tensor | None
    states: Tensor
    start: int
    source: str


def no_draft(decoder: Decoder, last: Tensor) -> Draft:
    """Nothing is drafted: a plain step.

    Args:
        decoder: the model.
        last: [B, 1], the newest settled token.
    """
    return Draft(last[:, :0], None, decoder.embed(last), start=0, source="model")


class Drafter(Protocol):
    """Proposes tokens."""

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
        """Draft up to n tokens after `last`.

        Args:
            last: [B, 1], the newest settled token, which no layer has seen yet.
            n: how many tokens to draft at most, 0 or more.
            cache: its lengths may be moved on; the caller sets them back.
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
        head: the exit, if it is not the decoder's own.
        length: decides how far to draft; None = as far as is asked for. For one row only.
    """

    source = "early-exit"

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int,
        sampling: Sampling,
        head: ShortHead | None = None,
        length: DraftLength | None = None,
    ) -> None:
        self.decoder, self.exit_layer, self.sampling = decoder, exit_layer, sampling
        self.head, self.length = head, length

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
        """See `Drafter`; the first E layers see the last drafted token too."""
        if self.length is not None and not self.length.begins():
            return no_draft(self.decoder, last)
        states: list[Tensor] = []
        chosen_from: list[Tensor] = []
        tokens = last
        for i in range(n + 1):
            hidden = self.decoder.embed(tokens[:, -1:])
            states.append(self.decoder.run(hidden, 0, self.exit_layer, cache))
            cache.lengths += 1
            if i == n or (self.length is not None and self.length.ends):
                break
            seen = None if history is None else history.before(tokens[:, 1:])[:, -1:]
            logits = self._logits(states[-1], seen)
            chosen, q = pick(logits, self.sampling, generator)
            if self.length is not None and not self.length.keeps(_probability(chosen, q, logits)):
                break
            token = chosen if self.head is None else self.head.token_ids[chosen]
            tokens = torch.cat([tokens, token], dim=1)
            if q is not None:
                chosen_from.append(q)
        return Draft(
            tokens=tokens[:, 1:],
            probabilities=self._whole(chosen_from),
            states=torch.cat(states, dim=1),
            start=self.exit_layer,
            source=self.source,
        )

    def _logits(self, hidden: Tensor, seen: Tensor | None) -> Tensor:
        """What the exit says, [B, 1, V], or [B, 1, n] where it has n tokens alone."""
        if self.head is None:
            return self.sampling.penalize(self.decoder.logits(hidden), seen)
        seen = None if seen is None else seen[..., self.head.token_ids]
        return self.sampling.penalize(self.head.logits(hidden), seen)

    def _whole(self, chosen_from: list[Tensor]) -> Tensor | None:
        """The distributions over all tokens, made once a round."""
        if not chosen_from:
            return None
        q = torch.cat(chosen_from, dim=1)
        return q if self.head is None else self.head.spread(q)


def _probability(chosen: Tensor, q: Tensor | None, logits: Tensor) -> float:
    """What the draft gives to its choice, [1, 1] of [1, 1, n]."""
    if q is None:
        q = logits.float().softmax(dim=-1)
    return float(q[0, 0, chosen[0, 0]])
