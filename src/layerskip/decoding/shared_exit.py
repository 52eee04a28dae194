"""`SharedExit`: the early exit of several rows, which draft their next tokens in one pass."""

from collections.abc import Sequence

import torch

from layerskip.decoding.drafters import Candidate, Draft, EarlyExit, ReducedHead, choose_draft
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder


class SharedExit:
    """Drafts a token for each of several rows with one pass of the first E layers and one of the head.

    Args:
        decoder: the model.
        exit_layer: E.
        vocabulary: token ids of the draft vocabulary that all rows have; None = all tokens.
    """

    name = EarlyExit.name

    def __init__(
        self, decoder: Decoder, exit_layer: int, vocabulary: tuple[int, ...] | None
    ) -> None:
        self.exit_layer, self.vocabulary = exit_layer, vocabulary
        self._decoder = decoder
        self._prompts: list[Sequence[int]] = []
        self._is_stale = False
        self._head = ReducedHead.of(decoder, vocabulary, ())

    def has(self, key: tuple[int, tuple[int, ...] | None] | None) -> bool:
        """Return whether a row's exit layer and draft vocabulary are these."""
        return key is not None and key == (self.exit_layer, self.vocabulary)

    @property
    def head_share(self) -> float:
        """Share of the head's rows that it multiplies with."""
        return 1.0 if self._head is None else self._head.share

    def set_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Let the draft vocabulary have the tokens of these prompts too."""
        if {*map(id, prompts)} != {*map(id, self._prompts)}:
            self._prompts, self._is_stale = [*prompts], self._head is not None

    def _update_head(self) -> None:
        """Collect the rows of the head anew, where other prompts have come and a draft needs it."""
        if self._is_stale:
            seen = {token for prompt in self._prompts for token in prompt}
            self._head = ReducedHead.of(self._decoder, self.vocabulary, seen)
            self._is_stale = False

    def propose(self, drafts: Sequence[Draft], samplers: Sequence[Sampler]) -> list[Candidate]:
        """Propose one token for each draft."""
        self._update_head()
        pending = [draft.take_pending() for draft in drafts]
        counts = [tokens.shape[1] for tokens in pending]
        hidden = self._decoder.embed(torch.cat(pending, dim=1))[0]
        rows = [(draft.cache, n) for draft, n in zip(drafts, counts, strict=True)]
        parts = self._decoder.run_rows(hidden, 0, self.exit_layer, rows).split(counts)
        for draft, part in zip(drafts, parts, strict=True):
            draft.add_states(part[None])
        exit_ = self._decoder if self._head is None else self._head.decoder
        logits = exit_.logits(torch.stack([part[-1] for part in parts])[None])
        return [
            choose_draft(logits[:, i : i + 1], draft, sampler, self._head)
            for i, (draft, sampler) in enumerate(zip(drafts, samplers, strict=True))
        ]
