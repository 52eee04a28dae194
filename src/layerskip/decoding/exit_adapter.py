"""`ExitAdapter`: drafts with a small trained layer behind the first E layers of a frozen model.

The adapter predicts the state that would leave the last layer: from the state that leaves layer E at a
position, and the last layer's state one position back (EAGLE, arXiv 2401.15077; Kangaroo, arXiv
2404.18911). For committed positions, that state is the model's own; for drafted positions, it is the
adapter's output. The adapter has a one-layer KV cache with its own length: positions that were decoded
without it are filled in one pass when it drafts next.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from layerskip.decoding.drafters import (
    Candidate,
    Draft,
    Drafter,
    DrafterInputs,
    ReducedHead,
    choose_draft,
    extend_at_once,
    register_drafter,
)
from layerskip.decoding.sampling import Sampler, Sampling
from layerskip.model import Decoder
from layerskip.model.draft_rule import DraftRule
from layerskip.model.exit_adapter import EPS, ExitAdapterWeights, joined
from layerskip.model.native import NativeDecoder, PackedMatrix
from layerskip.model.step_timing import TIMED_DRAFTS, draft_cost

_FLUSH_POSITIONS = 512  # of a long prompt: bounds the memory of states
_SMALL_PRODUCTS = 2.0  # time per byte, relative to a whole pass: an estimate, for GPUs


class ExitAdapter:
    """Drafts with an exit adapter, for one prompt.

    Args:
        decoder: the model.
        adapter: trained for it.
        sampler: of the generation; its penalties and mask hold for drafts too.
        head: the adapter's decoder with a head for its draft vocabulary and the prompt's tokens.
        capacity: positions of prompt and answer at most.
        head_share: see `Drafter`.
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
        head_share: float,
        with_confidence: bool = False,
    ) -> None:
        self.num_layers, self.head_share = adapter.settings.exit_layer, head_share
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
        self._guess: Tensor | None = None  # in a draft, whose tokens the cache has too
        self._n_drafted = 0

    def read_states(self, exit_states: Tensor, last_states: Tensor) -> None:
        """Take the states of the next committed positions, which ends a draft.

        Args:
            exit_states: [1, n, D], leaving layer E.
            last_states: [1, n, D], leaving layer L.
        """
        self._cache.lengths -= self._n_drafted
        self._guess, self._n_drafted = None, 0
        if not self._previous_states:
            exit_states = exit_states[:, 1:]
        self._exit_states.append(exit_states)
        self._previous_states.append(last_states)
        self._n_waiting += exit_states.shape[1]
        if self._n_waiting >= _FLUSH_POSITIONS:
            newest = last_states[:, -1:]
            self._previous_states[-1] = last_states[:, :-1]
            states = self._take_waiting()
            _run([self], [joined(*states).to(last_states.dtype)])
            self._guess, self._previous_states = None, [newest]

    def update(self, tokens: Sequence[int]) -> None:
        """Do nothing: `read_states` has what is needed."""

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        tokens = draft.take_pending()
        exit_states = self._decoder.run(
            self._decoder.embed(tokens), 0, self.num_layers, draft.cache
        )
        draft.add_states(exit_states)
        for state in exit_states.split(1, dim=1)[:-1]:
            advance([self], [state])
        return self._draft(exit_states[:, -1:], draft)

    @property
    def drafts_in_one_call(self) -> bool:
        """See `OneCallDrafter`."""
        decoder, base = self._head.decoder, self._decoder
        return (
            not (self.num_layers or self._sampler.changes_logits)
            and isinstance(decoder, NativeDecoder)
            and isinstance(base, NativeDecoder)
            and base.drafts_in_one_call
            and isinstance(self._adapter.projection, PackedMatrix)
        )

    def draft(self, draft: Draft, rule: DraftRule) -> Candidate | None:
        """See `OneCallDrafter`."""
        decoder, base, projection = self._head.decoder, self._decoder, self._adapter.projection
        assert isinstance(decoder, NativeDecoder)
        assert isinstance(base, NativeDecoder)
        assert isinstance(projection, PackedMatrix)
        embedded = base.embed(draft.take_pending())
        draft.add_states(embedded)
        for state in embedded.split(1, dim=1)[:-1]:
            advance([self], [state])
        states = self._states(embedded[:, -1:])
        drafted = decoder.adapter_draft(
            *states, self._cache, rule, self._head.token_ids, projection, base, EPS
        )
        self._receive(drafted.hidden[0, : len(states[0])])
        return extend_at_once(draft, self.name, drafted, has_states=False)

    def _draft(self, exit_state: Tensor, draft: Draft) -> Candidate:
        """Draft the token after the newest one, by its state [1, 1, D].

        Without penalties and mask it is the most likely one, even where the answer is sampled: that is
        accepted nearly as often as a sampled token, and drafted in half the time.
        """
        head, sampler, decoder = self._head, self._sampler, self._head.decoder
        if sampler.changes_logits:
            logits = decoder.logits(advance([self], [exit_state]))
            return choose_draft(logits, draft, sampler, head, self._with_confidence)
        entering = self._adapter.projection(self._inputs(exit_state))[None]
        outputs, chosen, confidence = decoder.greedy_pass(
            entering, (0, len(decoder.layers)), self._cache, with_confidence=self._with_confidence
        )
        self._receive(outputs[0])
        return Candidate(head.token_ids[chosen], [confidence])

    def _inputs(self, exit_state: Tensor) -> Tensor:
        """Return what the adapter reads for the newest token [n, 2 D]."""
        return joined(*self._states(exit_state)).to(exit_state.dtype)

    def _states(self, exit_state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of layer E, and of L one position back, for the newest token, both [n, D].

        For a committed one these are all positions that the cache lacks; for a drafted one, its own with
        the guess at the one before.
        """
        if self._guess is not None:
            self._n_drafted += 1
            return exit_state[0], self._guess[0]
        self._exit_states.append(exit_state)
        return self._take_waiting()

    def _take_waiting(self) -> tuple[Tensor, Tensor]:
        exit_states, previous = torch.cat(self._exit_states, 1), torch.cat(self._previous_states, 1)
        self._exit_states, self._previous_states, self._n_waiting = [], [], 0
        return exit_states[0], previous[0]

    def _receive(self, outputs: Tensor) -> None:
        """Take the adapter's outputs [n, D] for these inputs."""
        self._cache.lengths += len(outputs)
        self._guess = outputs[None, -1:]


def advance(adapters: Sequence[ExitAdapter], exit_states: Sequence[Tensor]) -> Tensor:
    """Run an adapter over the newest token of several rows, in one pass.

    Args:
        adapters: of the rows, with the same weights.
        exit_states: [1, 1, D] of each row, leaving layer E.

    Returns:
        Its guesses at the states that will leave layer L, [1, B, D].
    """
    pairs = zip(adapters, exit_states, strict=True)
    return _run(adapters, [adapter._inputs(state) for adapter, state in pairs])


def _run(adapters: Sequence[ExitAdapter], inputs: list[Tensor]) -> Tensor:
    """Run the adapter over inputs [n, 2 D] of each row; return the last outputs [1, B, D]."""
    weights, counts = adapters[0]._adapter, [len(part) for part in inputs]
    decoder = weights.decoder
    hidden = weights.projection(torch.cat(inputs))
    rows = [(adapter._cache, n) for adapter, n in zip(adapters, counts, strict=True)]
    outputs = decoder.run_rows(hidden, 0, len(decoder.layers), rows).split(counts)
    for adapter, part in zip(adapters, outputs, strict=True):
        adapter._receive(part)
    return torch.cat([part[-1:] for part in outputs])[None]


def draft_head(adapter: ExitAdapterWeights, prompt: Iterable[int] = ()) -> ReducedHead:
    """Return the head for an adapter's draft vocabulary and the tokens of a prompt."""
    head = ReducedHead.of(adapter.decoder, adapter.draft_vocabulary, prompt)
    assert head is not None
    return head


def head_share(
    decoder: Decoder, adapter: ExitAdapterWeights, *, token_by_token: bool = False
) -> float:
    """Return the cost of a drafted token of an adapter, in heads of the model; timed on a CPU.

    Args:
        decoder: the model.
        adapter: for it.
        token_by_token: no compiled call drafts several tokens, because of penalties or a mask, or
            because several rows draft together.
    """
    head_bytes = decoder.head_bytes
    head = draft_head(adapter)
    n_bytes = adapter.weight_bytes + head.decoder.head_bytes
    if decoder.device.type != "cpu":
        return _SMALL_PRODUCTS * n_bytes / head_bytes
    way = "token by token" if token_by_token else ""
    cost = draft_cost(decoder, n_bytes, lambda: _drafting(decoder, adapter, token_by_token), way)
    return cost * decoder.weight_bytes / head_bytes


def _drafting(
    decoder: Decoder, adapter: ExitAdapterWeights, token_by_token: bool
) -> Callable[[], object]:
    """Return a function that drafts one token and commits it; the next call drafts the one after."""
    head = draft_head(adapter)
    mask = _no_mask if token_by_token else None  # a mask prevents compiled drafts
    sampler = Sampler(Sampling(), decoder.device, logits_mask=mask)
    # Room for all committed tokens and a drafted one.
    drafter = ExitAdapter(
        decoder, adapter, sampler, head, TIMED_DRAFTS + 1, head_share=1.0, with_confidence=True
    )
    last, cache = torch.zeros(1, 1, dtype=torch.int64, device="cpu"), decoder.new_cache(1)
    state = decoder.embed(last)
    rule = DraftRule(
        rate=1.0, mean=1.0, acceptance=(1.0,), costs=(0.0,), head=0.0, overhead=0.0, lookahead=0
    )

    def draft() -> None:
        empty = Draft(last, cache)
        if drafter.drafts_in_one_call:
            drafter.draft(empty, rule)
            cache.lengths.zero_()
        else:  # without the base's layers, which are not part of the cost
            drafter._draft(state, empty)
        drafter.read_states(state, state)

    return draft


def _no_mask(tokens: Sequence[int]) -> None:
    """Allow all tokens."""


def _exit_adapter(inputs: DrafterInputs) -> list[Drafter]:
    adapter, (prompt,) = inputs.adapter, inputs.prompts
    if adapter is None:
        raise ValueError("this model has no exit adapter: train one with layerskip adapt")
    decoder, sampler, share = inputs.decoder, inputs.sampler, 1.0
    if inputs.adaptive:
        share = head_share(decoder, adapter, token_by_token=sampler.changes_logits)
    return [
        ExitAdapter(
            decoder,
            adapter,
            sampler,
            draft_head(adapter, prompt),
            inputs.capacity,
            head_share=share,
            with_confidence=inputs.adaptive,
        )
    ]


register_drafter(ExitAdapter.name, _exit_adapter)
