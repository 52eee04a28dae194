"""Where drafts come from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
        followed: the last so many tokens were not drafted by `source`, but follow it as n-grams.
    """

    tokens: Tensor
    probabilities: Tensor | None
    states: Tensor
    start: int
    source: str
    followed: int = 0


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


Follow = Callable[[list[int], int], list[int]]


class EarlyExitDrafter:
    """Drafts with the first E layers and an exit (section 4.3 of the paper).

    Args:
        decoder: the model.
        exit_layer: E.
        sampling: of the answer.
        head: the exit, if it is not the decoder's own.
        length: decides how far to draft; None = as far as is asked for. For one row only.

    Attributes:
        follow: given the drafted tokens and how many more there may be, what shall stand behind them.
            It ends the draft, and goes through the first E layers together with the last drafted token.
            None = nothing ever does.
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
        self.follow: Follow | None = None

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
        tokens, ids, behind = [last], list[int](), last[:, :0]
        for i in range(n + 1):
            if ids and i < n and self.follow is not None and (found := self.follow(ids, n - i)):
                behind = last.new_tensor([found])
            if behind.numel() or i == n or (self.length is not None and self.length.ends):
                newest = torch.cat([tokens[-1], behind], dim=1)
                hidden = self.decoder.embed(newest)
                states.append(self.decoder.run(hidden, 0, self.exit_layer, cache))
                cache.lengths += newest.shape[1]
                break
            state, token, q, confidence = self._step(tokens, cache, history, generator)
            states.append(state)
            cache.lengths += 1
            if self.length is not None and not self.length.keeps(float(confidence)):
                break
            tokens.append(token)
            if self.follow is not None:
                ids.append(int(token))
            if q is not None:
                chosen_from.append(q)
        return Draft(
            tokens=torch.cat([*tokens[1:], behind], dim=1),
            probabilities=self._whole(chosen_from, behind),
            states=torch.cat(states, dim=1),
            start=self.exit_layer,
            source=self.source,
            followed=behind.shape[1],
        )

    def _step(
        self,
        tokens: list[Tensor],
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The first E layers over the newest of some tokens, and what the exit makes of it.

        Returns:
            The state [B, 1, D], a token [B, 1], what it was drawn from (None if greedy), and how sure
            the exit is, its highest probability [B, 1]. Not the token's own: whether a token counts
            as drafted may depend on the distribution, but not on what was drawn from it, or tokens
            that are kept would not be distributed as q.
        """
        decoder, head, newest = self.decoder, self.head, tokens[-1]
        if self.sampling.greedy and history is None:
            if head is None:
                state, token, probability = decoder.draft_step(newest, self.exit_layer, cache)
            else:
                state, token, probability = head.draft_step(decoder, newest, self.exit_layer, cache)
            return state, token, None, probability
        state = decoder.run(decoder.embed(newest), 0, self.exit_layer, cache)
        seen = None
        if history is not None:
            seen = history.before(torch.cat([newest[:, :0], *tokens[1:]], dim=1))[:, -1:]
        if seen is not None and head is not None:
            seen = seen[..., head.token_ids]
        logits = self.sampling.penalize((head or decoder).logits(state), seen)
        chosen, q = pick(logits, self.sampling, generator)
        p = logits.float().softmax(dim=-1) if q is None else q
        token = chosen if head is None else head.token_ids[chosen]
        return state, token, q, p.amax(dim=-1)

    def _whole(self, chosen_from: list[Tensor], behind: Tensor) -> Tensor | None:
        """The distributions over all tokens, made once a round."""
        if not chosen_from:
            return None
        q = torch.cat(chosen_from, dim=1)
        whole = q if self.head is None else self.head.spread(q)
        return torch.cat([whole, certain(behind, whole.shape[-1])], dim=1)


def certain(tokens: Tensor, vocab_size: int) -> Tensor:
    """The distributions [B, d, V] that tokens [B, d] are drawn from where nothing else could be."""
    return one_hot(tokens, vocab_size).float()
