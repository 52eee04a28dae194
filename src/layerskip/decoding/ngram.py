"""Drafts from the text itself: what followed the last tokens where they stood before."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from layerskip.decoding.drafters import Draft, Drafter
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
        for token in tokens:
            # What ends here is known only now that something follows it, or it would find itself.
            end = len(self.tokens)
            for n, after in self._after.items():
                if end >= n:
                    after[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def propose(self, limit: int) -> list[int]:
        """What followed the longest earlier match of the last tokens; [] where there is none.

        Args:
            limit: tokens at most. What followed may reach the text's end before that; then the text
                repeats with a period, and so does the proposal.
        """
        tail = self.tokens[-MAX_MATCH:]
        for n in range(len(tail), MIN_MATCH - 1, -1):
            start = self._after[n].get(tuple(tail[-n:]))
            if start is not None:
                text = self.tokens[start : start + limit]
                return [text[i % len(text)] for i in range(limit)]
        return []


class NgramDrafter:
    """Drafts from the text where its last tokens stood before; elsewhere asks another drafter.

    Its tokens are certain, so their distribution q is 1 there, and sampling stays lossless.

    Args:
        decoder: the model.
        exit_layer: E of verification, which starts from states that left it; 0 where there is none.
        sampling: of the answer.
        prompt: its tokens.
        otherwise: drafts where nothing matches; None = nothing is drafted then.
    """

    source = "n-gram"

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int,
        sampling: Sampling,
        prompt: Sequence[int],
        otherwise: Drafter | None = None,
    ) -> None:
        self.decoder, self.exit_layer, self.sampling = decoder, exit_layer, sampling
        self.otherwise = otherwise
        self.index = NgramIndex(prompt)
        self._asked_other = False

    def settle(self, tokens: Sequence[int], accepted: int) -> None:
        """The answer is searched too."""
        self.index.extend(tokens)
        if self.otherwise is not None and self._asked_other:
            self.otherwise.settle(tokens, accepted)

    def draft(
        self,
        last: Tensor,
        n: int,
        cache: KVCache,
        history: TokenHistory | None,
        generator: torch.Generator | None,
    ) -> Draft:
        """See `Drafter`; all positions run at once, since the tokens are known."""
        proposal = self.index.propose(n)
        self._asked_other = not proposal
        if not proposal and self.otherwise is not None:
            return self.otherwise.draft(last, n, cache, history, generator)
        drafted = last.new_tensor([proposal])
        hidden = self.decoder.embed(torch.cat([last, drafted], dim=1))
        exit_states = self.decoder.run(hidden, 0, self.exit_layer, cache)
        cache.lengths += 1 + len(proposal)
        certain = None
        if proposal and not self.sampling.greedy:
            certain = one_hot(drafted, self.decoder.architecture.vocab_size).float()
        return Draft(
            tokens=drafted,
            probabilities=certain,
            exit_states=exit_states,
            source=self.source if proposal else "model",
        )
