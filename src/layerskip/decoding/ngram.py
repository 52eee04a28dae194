"""Drafts from the text itself: what followed the last tokens where they stood before."""

import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding.draft_length import DraftLength, NgramLength, by_match, by_share
from layerskip.decoding.draft_text import MAX_MATCH, MIN_MATCH, Datastore
from layerskip.decoding.drafters import Draft, EarlyExitDrafter
from layerskip.decoding.drawn_from import DrawnFrom
from layerskip.decoding.sampling import Sampling, TokenHistory
from layerskip.model import Decoder, KVCache

_PLACES = 32  # that are compared: some pairs stand everywhere


class NgramIndex:
    """Where each pair of tokens was seen, in a text that grows.

    Most steps of an answer find nothing, and a step of a small model is short: one look-up tells that
    there is no match of any length.

    Attributes:
        tokens: the text so far: prompt and settled answer.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        # Of each pair that something follows, the position after the last one; the newest pair is left
        # out, or it would find itself.
        self._newest: dict[tuple[int, int], int] = {}
        # Of each position, the one after the last such pair before it; 0 = there is none.
        self._before = [0] * MIN_MATCH
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add settled tokens."""
        self.tokens += tokens
        text, newest, before = self.tokens, self._newest, self._before
        for end in range(len(before), len(text)):
            pair = text[end - 2], text[end - 1]
            before.append(newest.get(pair, 0))
            newest[pair] = end

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]]:
        """What followed the longest earlier match of the last tokens, the newest of equal ones.

        It is looked for where the last two tokens stood most recently.

        Args:
            limit: tokens at most. What followed may reach the text's end before that; then the text
                repeats with a period, and so does the proposal.
            drafted: tokens behind the text, not settled yet.

        Returns:
            How many tokens match and what followed them; 0 and nothing where there is no match.
        """
        text = self.tokens
        tail = [*text[-MAX_MATCH:], *drafted][-MAX_MATCH:]
        start = self._newest.get((tail[-2], tail[-1]), 0) if len(tail) >= MIN_MATCH else 0
        best = found = 0
        for _ in range(_PLACES):
            if not start or best == len(tail):
                break
            match = MIN_MATCH
            while match < min(len(tail), start) and text[start - match - 1] == tail[-match - 1]:
                match += 1
            if match > best:
                best, found = match, start
            start = self._before[start]
        if not best:
            return 0, []
        text = [*text[found : found + limit], *drafted]
        return best, [text[i % len(text)] for i in range(limit)]


class NgramDrafter:
    """Drafts from the text where its last tokens stood before; elsewhere asks the early exit.

    Its tokens are certain, so their distribution q is 1 there, and sampling stays lossless.

    Args:
        decoder: the model.
        sampling: of the answer.
        prompt: its tokens.
        otherwise: drafts where nothing matches, or where it promises more; None = nothing is drafted.
        length: decides how many of the tokens are drafted; None = as many as are asked for.
        end_tokens: nothing is drafted beyond them.
        text: searched too; None = prompt and answer alone.
    """

    source = "n-gram"

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        prompt: Sequence[int],
        otherwise: EarlyExitDrafter | None = None,
        length: NgramLength | None = None,
        end_tokens: Collection[int] = (),
        text: Datastore | None = None,
    ) -> None:
        self.decoder, self.sampling, self.text = decoder, sampling, text
        self.otherwise, self.length, self.end_tokens = otherwise, length, end_tokens
        self.index = NgramIndex(prompt)
        self._proposed: list[int] = []
        self._drafted = False

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """The answer is searched too."""
        self.index.extend(tokens)
        if self.length is not None and self._proposed:  # what was not drafted is judged too
            pairs = zip(self._proposed, tokens, strict=False)
            right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            self.length.judge(right, len(tokens))
        if not self._drafted and self.otherwise is not None:
            self.otherwise.settle(tokens, accepted)
            if self.length is not None and self.otherwise.length is not None:
                self.length.learn_behind(accepted)
        elif self.length is not None:
            self.length.learn(accepted)

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> Draft | None:
        """See `Drafter`; no layer runs here, since verification can run them all at once."""
        proposal = self._proposal(n)
        self._drafted = bool(proposal)
        if not proposal:
            if self.otherwise is None:
                return None
            follow = None if self.length is None else self._follow
            return self.otherwise.draft(last, n, cache, history, generator, follow)
        drafted = last.new_tensor([proposal])
        q = None
        if not self.sampling.greedy:
            q = DrawnFrom(drafted, self.decoder.architecture.vocab_size)
        return Draft(
            tokens=drafted,
            drawn_from=q,
            states=self.decoder.embed(torch.cat([last, drafted], dim=1)),
            start=0,
            source=self.source,
        )

    def _proposal(self, n: int) -> list[int]:
        rival: DraftLength | None = self.otherwise.length if self.otherwise else None
        # Where an early exit drafts, the draft text stands behind its tokens, not in their place.
        tokens, evidence = self._best(self._found(n, text=rival is None or rival.rests))
        if self.length is None:
            return tokens
        self._proposed = tokens
        gain = rival.gain if rival and tokens else 0.0
        return tokens[: self.length.choose(evidence, gain)]

    def _follow(self, drafted: list[int], room: int) -> tuple[list[int], bool]:
        """What stands between an early exit's tokens, or behind them all; see `Follow`."""
        assert self.length is not None
        assert self.otherwise is not None
        draft = self.otherwise.length
        assert draft is not None
        if not draft.proven:
            return [], False
        found = self._found(room, drafted)
        # Of a sampled draft the exit's tokens come first, since only they were drawn from something.
        if self.sampling.greedy:
            tokens, evidence = self._best(found, 1)
            if n := self.length.instead(evidence, draft):
                return tokens[:n], False
        tokens, evidence = self._best(found)
        n = self.length.follow(evidence, draft) if drafted else 0
        return tokens[:n], n > 0

    def _found(
        self, n: int, drafted: Sequence[int] = (), *, text: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens, and what speaks for each, of prompt and answer, and of the draft text.

        They go as far as one that ends the answer.
        """
        match, tokens = self.index.propose(n, drafted)
        tokens = self._to_the_end(tokens)
        found = [(tokens, by_match(match, len(tokens)))]
        if self.text is not None and text:
            tokens, shares = self.text.propose([*self.index.tokens[-MAX_MATCH:], *drafted], n)
            tokens = self._to_the_end(tokens)
            found.append((tokens, by_share(shares[: len(tokens)])))
        return found

    def _best(
        self, found: Sequence[tuple[list[int], list[int]]], n: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Those of which more are right, of the first n; without a length those of prompt and answer."""
        length = self.length
        if length is None:
            return next((one for one in found if one[0]), found[0])
        return max(found, key=lambda one: length.expected(one[1][:n]))

    def _to_the_end(self, tokens: list[int]) -> list[int]:
        ends = (i for i, token in enumerate(tokens, 1) if token in self.end_tokens)
        return tokens[: next(ends, len(tokens))]
