"""`SharedExit`: the early exit, or the exit adapter, of several rows, which draft in one pass."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from layerskip.decoding.drafters import (
    Candidate,
    Draft,
    EarlyExit,
    ReducedHead,
    StateReader,
    choose_draft,
)
from layerskip.decoding.exit_adapter import ExitAdapter, advance, draft_head, head_share
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder
from layerskip.model.exit_adapter import ExitAdapterWeights


class DraftingRow(Protocol):
    """The parts of a row (a `RowDraft`) that a shared exit reads; `reader` may be its exit adapter."""

    draft: Draft
    sampler: Sampler
    reader: StateReader | None


class ExitKey(NamedTuple):
    """The exit that a row drafts with; rows share a pass where these are equal.

    Attributes:
        exit_layer: E.
        vocabulary: token ids of the draft vocabulary; None = all tokens.
        adapter: an exit adapter, or None for an early exit.
    """

    exit_layer: int
    vocabulary: tuple[int, ...] | None
    adapter: ExitAdapterWeights | None = None


class SharedExit:
    """Drafts a token for each of several rows with one pass of the first E layers and one of the head.

    An adapter runs between the two.

    Args:
        decoder: the model.
        key: what the rows draft with.
    """

    def __init__(self, decoder: Decoder, key: ExitKey) -> None:
        self.key, self._decoder = key, decoder
        self.name = EarlyExit.name if key.adapter is None else ExitAdapter.name
        self._prompts: list[Sequence[int]] = []
        self._is_stale = False
        self._head = self._head_with(())

    def _head_with(self, tokens: Iterable[int]) -> ReducedHead | None:
        """Return the head for the draft vocabulary and some tokens; None for the whole one."""
        key = self.key
        if key.adapter is not None:
            return draft_head(key.adapter, tokens)
        return ReducedHead.of(self._decoder, key.vocabulary, tokens)

    @property
    def head_share(self) -> float:
        """See `Drafter`."""
        if self.key.adapter is not None:
            return head_share(self._decoder, self.key.adapter, token_by_token=True)
        return 1.0 if self._head is None else self._head.share

    def set_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Let the draft vocabulary have the tokens of these prompts too."""
        if {*map(id, prompts)} != {*map(id, self._prompts)}:
            self._prompts, self._is_stale = [*prompts], self._head is not None

    def _update_head(self) -> None:
        """Collect the rows of the head anew, where other prompts have come and a draft needs it."""
        if self._is_stale:
            self._head = self._head_with({token for prompt in self._prompts for token in prompt})
            self._is_stale = False

    def propose(self, rows: Sequence[DraftingRow]) -> list[Candidate]:
        """Propose one token for each row."""
        self._update_head()
        pending = [row.draft.take_pending() for row in rows]
        counts = [tokens.shape[1] for tokens in pending]
        hidden = self._decoder.embed(torch.cat(pending, dim=1))[0]
        spans = [(row.draft.cache, n) for row, n in zip(rows, counts, strict=True)]
        parts = self._decoder.run_rows(hidden, 0, self.key.exit_layer, spans).split(counts)
        for row, part in zip(rows, parts, strict=True):
            row.draft.add_states(part[None])
        states = self._head_states(rows, torch.stack([part[-1] for part in parts])[None])
        exit_ = self._decoder if self._head is None else self._head.decoder
        # Without penalties, masks and sampling, one call chooses for all rows.
        if all(row.sampler.takes_argmax for row in rows):
            chosen, confidences = exit_.greedy_choice(states)
            tokens = chosen if self._head is None else self._head.token_ids[chosen]
            return [
                Candidate(tokens[:, i : i + 1], [confidence])
                for i, confidence in enumerate(confidences[0].tolist())
            ]
        logits = exit_.logits(states)
        return [
            choose_draft(logits[:, i : i + 1], row.draft, row.sampler, self._head)
            for i, row in enumerate(rows)
        ]

    def _head_states(self, rows: Sequence[DraftingRow], exit_states: Tensor) -> Tensor:
        """Return what the head reads, of the states that left layer E, both [1, B, D]."""
        if self.key.adapter is None:
            return exit_states
        adapters = [row.reader for row in rows if isinstance(row.reader, ExitAdapter)]
        return advance(adapters, exit_states.split(1, dim=1))
