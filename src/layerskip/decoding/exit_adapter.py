"""`ExitAdapter`: drafts with a small trained layer behind the first E layers of a frozen model.

The adapter predicts the state that would leave the last layer: from the state that leaves layer E at a
position, and the last layer's state one position back (EAGLE, arXiv 2401.15077; Kangaroo, arXiv
2404.18911). For committed positions, that state is the model's own; for drafted positions, it is the
adapter's output. The adapter has a one-layer KV cache with its own length: positions that were decoded
without it are filled in one pass when it drafts next.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layerskip.decoding.drafters import (
    Candidate,
    Draft,
    Drafter,
    DrafterInputs,
    ReducedHead,
    choose_draft,
    register_drafter,
)
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder
from layerskip.model.exit_adapter import ExitAdapterWeights, joined

_FLUSH_POSITIONS = 512  # of a long prompt: bounds the memory of states


class ExitAdapter:
    """Drafts with an exit adapter, for one prompt.

    Args:
        decoder: the model.
        adapter: trained for it.
        sampler: of the generation; the draft is sampled as the answer is.
        head: the adapter's decoder with a head for its draft vocabulary and the prompt's tokens.
        capacity: positions of prompt and answer at most.
        with_confidence: compute the confidence of greedy tokens, for an adaptive controller.
    """

    name = "exit-adapter"

    def __init__(
        self,
        decoder: Decoder,
        adapter: ExitAdapterWeights,
        sampler: Sampler,
        head: ReducedHead,
        capacity: int,
        *,
        with_confidence: bool = False,
    ) -> None:
        self.num_layers = adapter.settings.exit_layer
        self.head_share = head_share(decoder, adapter, head)
        self.prior = adapter.settings.acceptance
        self._decoder, self._adapter, self._sampler, self._head = decoder, adapter, sampler, head
        self._with_confidence = with_confidence
        self._cache = adapter.decoder.new_cache(capacity)
        # States of committed positions that the cache does not have yet, and of layer L one position
        # back: these are one more, for the newest token. In a draft the cache has it, and there is none.
        size = decoder.architecture.hidden_size
        self._exit_states: list[Tensor] = []
        self._previous_states = [torch.zeros(1, 1, size, device=decoder.device)]
        self._n_waiting = 0
        self._guess: Tensor | None = None  # in a draft

    def read_states(self, exit_states: Tensor, last_states: Tensor) -> None:
        """Take the states of the next committed positions, which ends a draft.

        Args:
            exit_states: [1, n, D], leaving layer E.
            last_states: [1, n, D], leaving layer L.
        """
        self._guess = None
        if not self._previous_states:
            exit_states = exit_states[:, 1:]
        self._exit_states.append(exit_states)
        self._previous_states.append(last_states)
        self._n_waiting += exit_states.shape[1]
        if self._n_waiting >= _FLUSH_POSITIONS:
            newest = last_states[:, -1:]
            self._previous_states[-1] = last_states[:, :-1]
            self._fill_cache()
            self._previous_states = [newest]

    def update(self, tokens: Sequence[int]) -> None:
        """Do nothing: `read_states` has what is needed."""

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        tokens = draft.take_pending()
        exit_states = self._decoder.run(
            self._decoder.embed(tokens), 0, self.num_layers, draft.cache
        )
        draft.add_states(exit_states)
        # 1. The newest committed token, with all positions that the cache lacks.
        if self._guess is None:
            self._exit_states.append(exit_states[:, :1])
            self._guess = self._fill_cache()
            self._n_drafted = 0
            exit_states = exit_states[:, 1:]
        # 2. Drafted tokens, each with the guess at the one before it: they are not committed.
        committed = self._cache.lengths.clone()
        for i in range(exit_states.shape[1]):
            self._cache.lengths.copy_(committed + self._n_drafted)
            self._guess = self._pass(exit_states[:, i : i + 1], self._guess)
            self._n_drafted += 1
        self._cache.lengths.copy_(committed)
        return self._choose(self._guess, draft)

    def _choose(self, hidden: Tensor, draft: Draft) -> Candidate:
        """Choose the token after a state [1, 1, D]."""
        head, sampler, with_confidence = self._head, self._sampler, self._with_confidence
        if not sampler.greedy or sampler.changes_logits:
            logits = head.decoder.logits(hidden)
            return choose_draft(logits, draft, sampler, head, with_confidence)
        chosen, confidence = head.decoder.greedy_choice(hidden, with_confidence=with_confidence)
        return Candidate(head.token_ids[chosen], [confidence])

    def _fill_cache(self) -> Tensor:
        """Run the adapter over the committed positions that wait; return its last output [1, 1, D]."""
        exit_states = torch.cat(self._exit_states, dim=1)
        out = self._pass(exit_states, torch.cat(self._previous_states, dim=1))
        self._cache.lengths += exit_states.shape[1]
        self._exit_states, self._previous_states, self._n_waiting = [], [], 0
        return out[:, -1:]

    def _pass(self, exit_states: Tensor, previous: Tensor) -> Tensor:
        """Run the adapter over states [1, n, D] after its cached positions.

        The caller sets the length.
        """
        b, t, d = exit_states.shape
        inputs = joined(exit_states, previous).view(b * t, 2 * d)
        hidden = self._adapter.projection(inputs.to(exit_states.dtype)).view(b, t, d)
        decoder = self._adapter.decoder
        return decoder.run(hidden, 0, len(decoder.layers), self._cache)


def draft_head(adapter: ExitAdapterWeights, prompt: Iterable[int] = ()) -> ReducedHead:
    """Return the head for an adapter's draft vocabulary and the tokens of a prompt."""
    head = ReducedHead.of(adapter.decoder, adapter.draft_vocabulary, prompt)
    assert head is not None
    return head


def head_share(decoder: Decoder, adapter: ExitAdapterWeights, head: ReducedHead) -> float:
    """Return the cost of a pass of an adapter and its head, in heads of the model."""
    return (adapter.weight_bytes + head.decoder.head_bytes) / decoder.head_bytes


def _exit_adapter(inputs: DrafterInputs) -> list[Drafter]:
    adapter, (prompt,) = inputs.adapter, inputs.prompts
    if adapter is None:
        raise ValueError("this model has no exit adapter: train one with layerskip adapt")
    return [
        ExitAdapter(
            inputs.decoder,
            adapter,
            inputs.sampler,
            draft_head(adapter, prompt),
            inputs.capacity,
            with_confidence=inputs.adaptive,
        )
    ]


register_drafter(ExitAdapter.name, _exit_adapter)
