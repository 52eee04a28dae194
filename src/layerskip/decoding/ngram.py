"""Drafts from the text itself: what followed the last tokens where they stood before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.draft_length import DraftLength, NgramLength
from layerskip.decoding.drafters import Draft, EarlyExitDrafter, certain, no_draft
from layerskip.decoding.sampling import Sampling, TokenHistory
from layerskip.model import Decoder, KVCache

MAX_MATCH, MIN_MATCH = 5, 2


class NgramIndex:
    """Where each short run of tokens was last seen, in a text that grows.

    Attributes:
        tokens: the text so far: prompt and settled answer.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        # One table for each length: the n tokens -> the position after them.
        self._after: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(MIN_MATCH, MAX_MATCH + 1)
        }
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add settled tokens; each costs as many look-ups as there are lengths."""
        begin = len(self.tokens)
        self.tokens += tokens
        end = len(self.tokens)
        for n, after in self._after.items():
            # Runs that something follows: the newest is left out, or it would find itself.
            first = min(max(begin, n), end)
            tail = self.tokens[max(first - n, 0) :]
            runs = zip(*(tail[i : i + end - first] for i in range(n)), strict=True)
            after.update(zip(runs, range(first, end), strict=True))

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]]:
        """What followed the longest earlier match of the last tokens.

        Args:
            limit: tokens at most. What followed may reach the text's end before that; then the text
                repeats with a period, and so does the proposal.
            drafted: tokens behind the text, not settled yet.

        Returns:
            How many tokens match and what followed them; 0 and nothing where there is no match.
        """
        tail = [*self.tokens[-MAX_MATCH:], *drafted][-MAX_MATCH:]
        for n in range(len(tail), MIN_MATCH - 1, -1):
            start = self._after[n].get(tuple(tail[-n:]))
            if start is not None:
                text = [*self.tokens[start : start + limit], *drafted]
                return n, [text[i % len(text)] for i in range(limit)]
        return 0, []


class NgramDrafter:
    """Drafts from the text where its last tokens stood before; elsewhere asks the early exit.

    Its tokens are certain, so their distribution q is 1 there, and sampling stays lossless.

    Args:
        decoder: the model.
        sampling: of the answer.
        prompt: its tokens.
        otherwise: drafts where nothing matches, or where it promises more; None = nothing is drafted.
        length: decides how many of the tokens are drafted; None = as many as are asked for.
    """

    source = "n-gram"

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        prompt: Sequence[int],
        otherwise: EarlyExitDrafter | None = None,
        length: NgramLength | None = None,
    ) -> None:
        self.decoder, self.sampling = decoder, sampling
        self.otherwise, self.length = otherwise, length
        self.index = NgramIndex(prompt)
        self._drafted = False
        if otherwise is not None and length is not None:
            otherwise.follow = self._follow

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """The answer is searched too."""
        self.index.extend(tokens)
        if not self._drafted and self.otherwise is not None:
            self.otherwise.settle(tokens, accepted)
            draft = self.otherwise.length
            if self.length is not None and draft is not None:
                self.length.learn_followed(accepted - draft.drafted)
        elif self.length is not None:
            self.length.learn(accepted)

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> Draft:
        """See `Drafter`; no layer runs here, since verification can run them all at once."""
        proposal = self._proposal(n)
        self._drafted = bool(proposal)
        if not proposal:
            if self.otherwise is None:
                return no_draft(self.decoder, last)
            return self.otherwise.draft(last, n, cache, history, generator)
        drafted = last.new_tensor([proposal])
        q = None
        if not self.sampling.greedy:
            q = certain(drafted, self.decoder.architecture.vocab_size)
        return Draft(
            tokens=drafted,
            probabilities=q,
            states=self.decoder.embed(torch.cat([last, drafted], dim=1)),
            start=0,
            source=self.source,
        )

    def _proposal(self, n: int) -> list[int]:
        match, tokens = self.index.propose(n)
        if self.length is None:
            return tokens
        rival: DraftLength | None = self.otherwise.length if self.otherwise else None
        return tokens[: self.length.choose(match, len(tokens), rival.gain if rival else 0.0)]

    def _follow(self, drafted: list[int], room: int) -> list[int]:
        """What stands behind an early exit's draft, where that promises more than drafting on."""
        assert self.length is not None
        assert self.otherwise is not None
        draft = self.otherwise.length
        if draft is None:
            return []
        match, tokens = self.index.propose(room, drafted)
        return tokens[: self.length.follow(match, len(tokens), draft)]
