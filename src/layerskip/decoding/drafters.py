"""Where drafts come from."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from layerskip.decoding.draft_length import DraftLength
from layerskip.decoding.drawn_from import DrawnFrom
from layerskip.decoding.sampling import Sampling, TokenHistory
from layerskip.decoding.short_head import ReducedHead
from layerskip.decoding.step import Step
from layerskip.model import Decoder, Distributions, Draws, GoesOn, KVCache, most_likely, read_draft


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposed tokens, and what verification needs to know of how they came about.

    Attributes:
        tokens: [B, d] int64.
        drawn_from: the distributions that they were drawn from; None if greedy or d = 0.
        states: [B, d + 1, D], the hidden states that enter layer `start` at the position before each
            drafted token and at the last drafted token: what verification starts from.
        start: how many layers have seen these positions: E where the early exit drafted, else 0.
        source: the drafter that was asked.
        from_exit: how many of the tokens an early exit drafted; n-grams may follow them.
        refused: how many more it drafted, which were left out as unsure.
    """

    tokens: Tensor
    drawn_from: DrawnFrom | None
    states: Tensor
    start: int
    source: str
    from_exit: int = 0
    refused: int = 0

    def step(self, row: Sequence[int]) -> Step:
        """The step of a row: its d drafted tokens, the model's own, and how many drafted ones stand."""
        *drafted, own, count = row
        more = (tuple(drafted[count:]), self.from_exit, self.refused)
        return Step((*drafted[:count], own), len(drafted), count, self.source, *more)


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
    ) -> Draft | None:
        """Draft up to n tokens after `last`; None where no layer has run and nothing is drafted.

        Args:
            last: [B, 1], the newest settled token, which no layer has seen yet.
            n: how many tokens to draft at most.
            cache: its lengths are left as they are.
            history: for the repetition penalty, or None.
            generator: source of randomness for sampling.
        """
        ...


# Drafted tokens, and how many more there may be -> what a text has for these places, and whether the
# draft ends with it; [] where the exit should go on.
Follow = Callable[[list[int], int], tuple[list[int], bool]]


class EarlyExitDrafter:
    """Drafts with the first E layers and an exit (section 4.3 of the paper).

    Args:
        decoder: the model.
        exit_layer: E.
        sampling: of the answer.
        head: the exit, if it is not the decoder's own.
        length: decides how far to draft; None = as far as is asked for. For one row only.
        end_tokens: where a draft that decides its own length ends; there is nothing behind them.
    """

    source = "early-exit"

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int,
        sampling: Sampling,
        head: ReducedHead | None = None,
        length: DraftLength | None = None,
        end_tokens: Collection[int] = (),
    ) -> None:
        self.decoder, self.exit_layer, self.sampling = decoder, exit_layer, sampling
        self.head, self.length, self.end_tokens = head, length, end_tokens
        self._refused: list[int] = []  # the token that was left out of the last draft, if one was

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """The cache has the tokens; how many were right teaches how far to draft."""
        if self.length is None:
            return
        # A sampled token says little of whether another one would have been accepted.
        shown = self._refused and self.sampling.greedy and accepted == self.length.drafted
        self.length.learn(accepted, tokens[accepted] in self._refused if shown else None)

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
        follow: Follow | None = None,
    ) -> Draft | None:
        """See `Drafter`; the first E layers see the last drafted token too.

        `follow` tells what a text has for the places behind the tokens so far: it goes through the first
        E layers at once, together with the token before it. None = there is no text, as for a draft that
        does not choose its length.
        """
        length, self._refused = self.length, []
        if (length is not None and not length.begins(n)) or not n:
            return None
        ids, text, from_text, is_over = list[int](), list[int](), 0, False

        def goes_on(token: int, confidence: float) -> bool:
            nonlocal text, is_over
            assert length is not None
            if not length.keeps(confidence):
                self._refused.append(token)
                return False
            ids.append(token)
            if token in self.end_tokens:
                return False
            if follow is not None and len(ids) < n:
                text, is_over = follow(ids, n - len(ids))
            return not text and not length.ends

        asked = None if length is None else goes_on
        settled = cache.lengths.clone()
        states, tokens, drawn = list[Tensor](), [last[:, :0]], list[tuple[Distributions, Tensor]]()
        newest = last  # what the first layers have not seen: a token, and what a text has behind it
        if follow is not None:
            text, is_over = follow(ids, n)
        while True:
            if text:
                tokens.append(last.new_tensor([text] * len(last)))
                newest = torch.cat([newest, tokens[-1]], dim=1)
                ids, text, from_text = [*ids, *text], [], from_text + len(text)
                assert length is not None
                is_over = is_over or len(ids) == n or ids[-1] in self.end_tokens or length.ends
            if is_over:
                break
            found, chosen, q = self._chosen(
                newest, tokens, n - len(ids), cache, history, generator, asked
            )
            states.append(found)
            tokens.append(chosen[:, :-1] if self._refused else chosen)
            drawn += q[:-1] if self._refused else q
            newest = chosen[:, -1:]
            if not text:
                break
        if not self._refused:
            states.append(self._run(newest, cache))
        cache.lengths.copy_(settled)
        drafted = torch.cat(tokens, dim=1)
        return Draft(
            tokens=drafted,
            drawn_from=self._drawn_from(drafted, drawn) if drawn else None,
            states=torch.cat(states, dim=1),
            start=self.exit_layer,
            source=self.source,
            from_exit=drafted.shape[1] - from_text,
            refused=len(self._refused),
        )

    def _run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self.decoder.run(self.decoder.embed(tokens), 0, self.exit_layer, cache)

    def _chosen(
        self,
        newest: Tensor,
        before: Sequence[Tensor],
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
        goes_on: GoesOn | None,
    ) -> tuple[Tensor, Tensor, list[tuple[Distributions, Tensor]]]:
        """Up to n times the first E layers over the newest tokens, and what the exit makes of the last.

        Args:
            newest: [B, T], what those layers have not seen.
            before: the draft so far, in parts [B, k].
            n: see `Drafter`, as the next three.
            cache: its lengths are moved on.
            history: without the draft.
            generator: of what is drawn.
            goes_on: see `Decoder.draft`.

        Returns:
            The states [B, T - 1 + m, D], the tokens [B, m], and what each was drawn from and which of
            the exit's tokens it is [B, 1] (none if greedy).
        """
        decoder, head, sampling = self.decoder, self.head, self.sampling
        short = None if head is None else head.short
        draws = sampling.draws(generator)
        if history is None and (sampling.greedy or draws is not None):
            ids = None if head is None else head.token_ids
            found = decoder.draft(newest, n, self.exit_layer, cache, short, ids, goes_on, draws)
            return *found, [] if draws is None else draws.drawn
        draws = Draws(sampling.temperature, generator)
        states, tokens = list[Tensor](), [newest]
        seen = None if history is None else history.before(torch.cat([*before], dim=1))[:, -1:]
        for _ in range(n):
            states.append(decoder.run(decoder.embed(tokens[-1]), 0, self.exit_layer, cache))
            cache.lengths += tokens[-1].shape[1]
            state = states[-1][:, -1:]
            known = seen if seen is None or head is None else seen[..., head.token_ids]
            exit_ = short or decoder
            if sampling.greedy:
                logits = sampling.penalize(exit_.logits(state), known)
                chosen = most_likely(logits)
                p = Distributions(logits if goes_on is None else logits.float().softmax(dim=-1))
            else:
                # A draft that has overflowed is refused: any q will do.
                p = sampling.distributions(exit_, state, known).or_any()
                chosen = draws.next(p, newest)
            tokens.append(chosen if head is None else head.token_ids[chosen])
            if seen is not None:
                seen.scatter_(2, tokens[-1][..., None], True)
            # Whether a token counts as drafted may depend on the distribution, but not on what was drawn
            # from it, or tokens that are kept would not be distributed as q.
            if goes_on is not None and not goes_on(*read_draft(tokens[-1], p.highest(0))):
                break
        return torch.cat(states, dim=1), torch.cat(tokens, dim=1)[:, newest.shape[1] :], draws.drawn

    def _drawn_from(self, tokens: Tensor, drawn: list[tuple[Distributions, Tensor]]) -> DrawnFrom:
        exits, chosen = zip(*drawn, strict=True)
        return DrawnFrom(tokens, self.decoder.architecture.vocab_size, exits, chosen, self.head)
