"""Sources of drafts. Each proposes tokens and knows neither the others nor what its tokens cost.

The early exit is the paper's drafter (section 4.3). N-grams of prompt and answer (prompt lookup), a
retrieval datastore (REST, arXiv 2311.08252), a predicted output and the tokens that a grammar forces run
no layer. A further drafter is one class with the methods of `Drafter` and one call of
`register_drafter`.
"""

import bisect
import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layerskip.decoding.constraint import Constraint
from layerskip.decoding.datastore import MAX_MATCH, MIN_MATCH, Datastore
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder, KVCache, argmax
from layerskip.model.draft_rule import DraftRule
from layerskip.model.exit_adapter import AcceptanceCounts, ExitAdapterWeights
from layerskip.model.native import NativeDecoder
from layerskip.model.native.native_decoder import GreedyDraft

# Probability that the token after a match of 2, 3, ... tokens follows again, before any is verified.
_NGRAM_CONFIDENCE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SHARE_POWER = 1.5  # a share of 6 in 10 in one text is one of about 5 in 10 in another
_MAX_POSITIONS = 32  # compared for one proposal: some pairs stand everywhere
# Probability that a prediction's next token is right after 0, 1, 2, ... right ones in a row.
_PREDICTION_CONFIDENCE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Tokens proposed to follow a draft.

    Attributes:
        tokens: [B, n] int64; n = 0 where there is no proposal.
        confidences: n numbers from 0 to 1, the drafter's own guess that each is accepted if all before
            it are. With sampling they may depend on q, but not on the token sampled from it, or the
            tokens that a controller keeps would not be distributed as q.
        probs: n distributions q [B, V] that the tokens were sampled from; None for point masses.
    """

    tokens: Tensor
    confidences: Sequence[float]
    probs: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1]

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first row."""
        return [int(token) for token in self.tokens[0].tolist()]


_NO_TOKENS = Candidate(torch.empty(1, 0, dtype=torch.int64, device="cpu"), ())


class Draft:
    """The tokens drafted in one round, and how far the first layers have run over them.

    Args:
        last: [B, 1], the newest committed tokens, which no layer has seen yet.
        cache: the KV cache; `hidden_states` sets its lengths back.
        context: all committed tokens of prompt and answer, of one row.

    Attributes:
        parts: the drafted tokens, in tensors [B, n].
        token_ids: those of the first row, as far as `extend` was told to read them.
        sources: name of the drafter of each token.
        confidences: see `Candidate`.
        probs: see `Candidate`; None for a point mass.
        states: hidden states [B, n, D] that left layer E, in order.
        pending: tokens [B, n] that the first layers have not seen, in order.
        discarded: number of proposed tokens that were left out for too little confidence.
    """

    def __init__(self, last: Tensor, cache: KVCache, context: Sequence[int] = ()) -> None:
        self.last, self.cache, self.context = last, cache, context
        self.parts: list[Tensor] = []
        self.token_ids: list[int] = []
        self.sources: list[str] = []
        self.confidences: list[float] = []
        self.probs: list[Tensor | None] = []
        self.states: list[Tensor] = []
        self.pending: list[Tensor] = [last]
        self.discarded = 0

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def tokens(self) -> Tensor:
        """The drafted tokens, [B, d]."""
        return torch.cat(self.parts, dim=1) if self.parts else self.last[:, :0]

    def extend(
        self, candidate: Candidate, n: int, source: str, *, has_states: bool = False
    ) -> None:
        """Append the first n tokens of a candidate; `has_states`: the first layers have seen them."""
        tokens = candidate.tokens[:, :n]
        self.parts.append(tokens)
        if not has_states:
            self.pending.append(tokens)
        self.sources += [source] * n
        self.confidences += candidate.confidences[:n]
        self.probs += [None] * n if candidate.probs is None else candidate.probs[:n]

    def take_pending(self) -> Tensor:
        """Return the tokens that the first layers have not seen [B, n]; they are about to."""
        pending, self.pending = self.pending, []
        if not pending:
            return self.last[:, :0]
        return pending[0] if len(pending) == 1 else torch.cat(pending, dim=1)

    def add_states(self, hidden: Tensor) -> None:
        """Note hidden states [B, n, D] that left layer E, whose keys and values are in the cache."""
        self.states.append(hidden)
        self.cache.lengths += hidden.shape[1]

    def hidden_states(self, decoder: Decoder, exit_layer: int | None) -> tuple[Tensor, int]:
        """Return what verification starts from, and set the cache back to the committed tokens.

        Returns:
            The hidden states [B, d + 1, D] of `last` and of each drafted token, and the number of
            layers that have run on them: E where the early exit drafted, else 0.
        """
        if not self.states or exit_layer is None:
            return decoder.embed(self.take_pending()), 0
        n_positions = sum(hidden.shape[1] for hidden in self.states)
        if self.pending:  # the last drafted tokens
            hidden = decoder.embed(self.take_pending())
            self.states.append(decoder.run(hidden, 0, exit_layer, self.cache))
        self.cache.lengths -= n_positions
        return torch.cat(self.states, dim=1), exit_layer

    def all_probs(self, vocab_size: int) -> Tensor | None:
        """Return the distributions q [B, d, V], one-hot for point masses; None where all are."""
        if all(q is None for q in self.probs):
            return None
        rows = []
        for i, q in enumerate(self.probs):
            if q is None:
                token = self.tokens[:, i : i + 1]
                q = torch.zeros(len(token), vocab_size, dtype=torch.float32, device=token.device)
                q.scatter_(1, token, 1.0)
            rows.append(q)
        return torch.stack(rows, dim=1)


class Drafter(Protocol):
    """Proposes tokens.

    Attributes:
        name: as in `draft_from` and in results.
        num_layers: layers that a proposal runs for each token, E or 0.
        head_share: its further products, in units of the whole head; 0 for a look-up.
        prior: acceptance measured before, which a controller begins with; None where it is unknown.
    """

    name: str
    num_layers: int
    head_share: float
    prior: AcceptanceCounts | None

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """Propose up to `max_tokens` tokens that follow a draft.

        A drafter with a head proposes one at a time, since each costs a pass.
        """
        ...

    def update(self, tokens: Sequence[int]) -> None:
        """Learn the tokens that were committed; called once for each, before the next proposal."""
        ...


@runtime_checkable
class StateReader(Protocol):
    """A drafter that goes by the hidden states of what the model has decoded.

    Attributes:
        num_layers: E; the states that leave this layer are read too.
    """

    num_layers: int

    def read_states(self, exit_states: Tensor, last_states: Tensor) -> None:
        """Take the states of the next committed positions, of one row.

        Args:
            exit_states: [1, n, D], leaving layer E.
            last_states: [1, n, D], leaving layer L.
        """
        ...


@runtime_checkable
class OneCallDrafter(Protocol):
    """A drafter with a head that can make a whole draft in one call of the compiled kernels."""

    name: str

    @property
    def drafts_in_one_call(self) -> bool:
        """True where it can in this generation."""
        ...

    def draft(self, draft: Draft, rule: DraftRule) -> Candidate | None:
        """Extend a draft as `draft_by` does."""
        ...


def draft_by(drafter: Drafter, draft: Draft, rule: DraftRule) -> Candidate | None:
    """Extend a draft by a token, and by further ones until a rule ends it.

    Returns:
        A token that was proposed and not kept, or None.
    """
    if isinstance(drafter, OneCallDrafter) and drafter.drafts_in_one_call:
        return drafter.draft(draft, rule)
    kept, survival = list[int](), rule.survival
    while not (kept and rule.has_ended(survival, kept)):
        candidate = drafter.propose(draft, 1)
        (token,), (confidence,) = candidate.token_ids, candidate.confidences
        survival = rule.survival_after(survival, confidence)
        if not rule.keeps(survival, len(kept)):
            return candidate
        draft.extend(candidate, 1, drafter.name)
        kept.append(token)
    return None


def extend_at_once(
    draft: Draft, source: str, made: GreedyDraft, *, has_states: bool
) -> Candidate | None:
    """Extend a draft by tokens that one call has drafted; see `Draft.extend` and `draft_by`."""
    _, tokens, confidences, n = made
    draft.extend(Candidate(tokens, confidences), n, source, has_states=has_states)
    return Candidate(tokens[:, n:], confidences[n:]) if tokens.shape[1] > n else None


class EarlyExit:
    """Drafts with the first E layers and the shared exit (section 4.3 of the paper).

    Args:
        decoder: the model.
        exit_layer: E.
        sampler: of the generation; the draft is sampled as the answer is.
        head: a reduced-vocabulary head; None = the whole one.
        with_confidence: compute the confidence of greedy tokens, for an adaptive controller.
    """

    name = "early-exit"
    prior: AcceptanceCounts | None = None

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int,
        sampler: Sampler,
        head: "ReducedHead | None" = None,
        *,
        with_confidence: bool = False,
    ) -> None:
        self.num_layers, self.head_share = exit_layer, 1.0 if head is None else head.share
        self._decoder, self._sampler, self._head = decoder, sampler, head
        self._exit = decoder if head is None else head.decoder
        self._with_confidence = with_confidence

    def update(self, tokens: Sequence[int]) -> None:
        """Do nothing: the cache has the tokens."""

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        tokens, sampler = draft.take_pending(), self._sampler
        if sampler.takes_argmax:
            hidden, chosen, confidence = self._exit.greedy_step(
                tokens, self.num_layers, draft.cache, with_confidence=self._with_confidence
            )
            draft.add_states(hidden)
            return Candidate(self._token_ids(chosen), [confidence])
        hidden = self._decoder.run(self._decoder.embed(tokens), 0, self.num_layers, draft.cache)
        draft.add_states(hidden)
        logits = self._exit.logits(hidden[:, -1:])
        return choose_draft(logits, draft, sampler, self._head, self._with_confidence)

    @property
    def drafts_in_one_call(self) -> bool:
        """See `OneCallDrafter`."""
        return self._sampler.takes_argmax and self._exit.drafts_in_one_call

    def draft(self, draft: Draft, rule: DraftRule) -> Candidate | None:
        """See `OneCallDrafter`."""
        assert isinstance(self._exit, NativeDecoder)
        ids = None if self._head is None else self._head.token_ids
        tokens = draft.take_pending()
        drafted = self._exit.greedy_draft(tokens, self.num_layers, draft.cache, rule, ids)
        draft.add_states(drafted.hidden)
        return extend_at_once(draft, self.name, drafted, has_states=True)

    def _token_ids(self, chosen: Tensor) -> Tensor:
        return chosen if self._head is None else self._head.token_ids[chosen]


def choose_draft(
    logits: Tensor,
    draft: Draft,
    sampler: Sampler,
    head: "ReducedHead | None",
    with_confidence: bool = True,
) -> Candidate:
    """Choose a drafted token as the answer's tokens are chosen.

    Args:
        logits: [1, 1, n] after a draft, of a reduced head if there is one.
        draft: the tokens before.
        sampler: of the generation.
        head: the reduced-vocabulary head, or None.
        with_confidence: compute the highest probability; else the confidence is 1.
    """
    token_ids = None if head is None else head.token_ids
    logits = sampler.process(logits, draft.tokens, token_ids)
    if sampler.greedy:
        chosen = argmax(logits)
        highest = 1.0 / (logits - logits.amax()).float().exp().sum() if with_confidence else 1.0
        tokens = chosen if token_ids is None else token_ids[chosen]
        return Candidate(tokens, [float(highest)])
    # Drafts are verified, so that where the exit has overflowed any distribution is right.
    probs = sampler.sampling.probabilities(logits)[:, 0].nan_to_num(1.0)
    chosen = sampler.sample(probs)[:, None]
    highest = probs.amax() if with_confidence else 1.0
    q = probs if head is None else head.scatter(probs)
    tokens = chosen if token_ids is None else token_ids[chosen]
    return Candidate(tokens, [float(highest)], [q])


class NgramIndex:
    """Positions of each pair of tokens in a text that grows.

    Most steps of an answer match nothing, and a step of a small model is short: one look-up tells that
    there is no match of any length.

    Attributes:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        # The position after the last occurrence of a pair that something follows. The newest pair is
        # left out, since it would match itself.
        self._newest: dict[tuple[int, int], int] = {}
        # For each position, the one after the previous occurrence of the same pair; 0 = none.
        self._previous = [0] * MIN_MATCH
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        self.tokens += tokens
        text, newest, previous = self.tokens, self._newest, self._previous
        for end in range(len(previous), len(text)):
            pair = text[end - 2], text[end - 1]
            previous.append(newest.get(pair, 0))
            newest[pair] = end

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]]:
        """Return the length of the longest match of the last tokens, and what followed it.

        Of equally long matches the newest counts, among the last `_MAX_POSITIONS` of the last pair.

        Args:
            limit: maximum number of tokens. What followed may reach the end of the text before; then
                the text is periodic, and so is the proposal.
            drafted: tokens behind the text.
        """
        text = self.tokens
        tail = [*text[-MAX_MATCH:], *drafted][-MAX_MATCH:]
        start = self._newest.get((tail[-2], tail[-1]), 0) if len(tail) >= MIN_MATCH else 0
        best_length = best_start = 0
        for _ in range(_MAX_POSITIONS):
            if not start or best_length == len(tail):
                break
            length = MIN_MATCH
            while length < min(len(tail), start) and text[start - length - 1] == tail[-length - 1]:
                length += 1
            if length > best_length:
                best_length, best_start = length, start
            start = self._previous[start]
        if not best_length:
            return 0, []
        following = [*text[best_start : best_start + limit], *drafted]
        return best_length, [following[i % len(following)] for i in range(limit)]


class _Lookup:
    """Base of drafters that look tokens up; their proposals end at an end token.

    Args:
        eos_token_ids: nothing is drafted beyond them.
    """

    num_layers, head_share = 0, 0.0
    prior: AcceptanceCounts | None = None

    def __init__(self, eos_token_ids: Collection[int] = ()) -> None:
        self._eos_token_ids = eos_token_ids

    def _candidate(self, draft: Draft, tokens: list[int], confidences: list[float]) -> Candidate:
        if not tokens:  # in most rounds
            return _NO_TOKENS
        ends = (i for i, token in enumerate(tokens, 1) if token in self._eos_token_ids)
        n = next(ends, len(tokens))
        return Candidate(draft.last.new_tensor([tokens[:n]], dtype=torch.int64), confidences[:n])


class Ngram(_Lookup):
    """Proposes what followed the last tokens where they stood before, in prompt or answer.

    Args:
        prompt: its tokens.
        eos_token_ids: nothing is drafted beyond them.
    """

    name = "n-gram"

    def __init__(self, prompt: Sequence[int], eos_token_ids: Collection[int] = ()) -> None:
        super().__init__(eos_token_ids)
        self.index = NgramIndex(prompt)

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`: the answer is searched too."""
        self.index.extend(tokens)

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        match, tokens = self.index.propose(max_tokens, draft.token_ids)
        longest = len(_NGRAM_CONFIDENCE) - 1
        confidences = [
            _NGRAM_CONFIDENCE[min(match - MIN_MATCH + i, longest)] for i in range(len(tokens))
        ]
        return self._candidate(draft, tokens, confidences)


class DatastoreLookup(_Lookup):
    """Proposes what most often followed the last tokens in a datastore of texts like the answers."""

    name = "datastore"

    def __init__(self, datastore: Datastore, eos_token_ids: Collection[int] = ()) -> None:
        super().__init__(eos_token_ids)
        self._datastore = datastore

    def update(self, tokens: Sequence[int]) -> None:
        """Do nothing: the datastore does not grow."""

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        tail = [*draft.context[-MAX_MATCH:], *draft.token_ids]
        tokens, shares = self._datastore.propose(tail, max_tokens)
        return self._candidate(draft, tokens, [share**_SHARE_POWER for share in shares])


class Prediction(_Lookup):
    """Proposes the next part of a text that the answer is predicted to be.

    The place in the prediction moves on with the answer. A token that deviates counts as a replacement
    of the predicted one, until the last tokens of the answer stand elsewhere in the prediction: then the
    answer goes on there. Of several such places the longest match counts, of these the nearest.

    Args:
        prediction: its tokens.
        eos_token_ids: nothing is drafted beyond them.
    """

    name = "prediction"

    def __init__(self, prediction: Sequence[int], eos_token_ids: Collection[int] = ()) -> None:
        super().__init__(eos_token_ids)
        self._prediction = list(prediction)
        # The positions after each pair of tokens, in ascending order.
        self._after: dict[tuple[int, int], list[int]] = {}
        for end, pair in enumerate(itertools.pairwise(prediction), MIN_MATCH):
            self._after.setdefault(pair, []).append(end)
        self._tail: list[int] = []  # the answer's last tokens
        # The next position, and how many tokens before it the answer has in a row.
        self._place = 0, 0

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`: the answer's tokens move the place in the prediction."""
        self._place = self._follow(tokens)
        self._tail = [*self._tail, *tokens][-MAX_MATCH:]

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        position, matched = self._follow(draft.token_ids)
        tokens = self._prediction[position : position + max_tokens]
        longest = len(_PREDICTION_CONFIDENCE) - 1
        confidences = [
            _PREDICTION_CONFIDENCE[min(matched + i, longest)] for i in range(len(tokens))
        ]
        return self._candidate(draft, tokens, confidences)

    def _follow(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the place after more tokens of the answer."""
        (position, matched), tail = self._place, self._tail
        for token in tokens:
            tail = [*tail[1 - MAX_MATCH :], token]
            if self._prediction[position : position + 1] == [token]:
                position, matched = position + 1, matched + 1
            else:
                position, matched = self._find(tail, position + 1)
        return position, matched

    def _find(self, tail: Sequence[int], expected: int) -> tuple[int, int]:
        """Return the position after the longest match of the last tokens, and its length."""
        places = self._after.get((tail[-2], tail[-1]), []) if len(tail) >= MIN_MATCH else []
        middle = bisect.bisect_left(places, expected)
        near = places[max(middle - _MAX_POSITIONS // 2, 0) : middle + _MAX_POSITIONS // 2]
        best, best_length = expected, 0
        for position in sorted(near, key=lambda place: abs(place - expected)):
            length = MIN_MATCH
            while (
                length < min(len(tail), position)
                and self._prediction[position - length - 1] == tail[-length - 1]
            ):
                length += 1
            if length > best_length:
                best, best_length = position, length
        return best, best_length


class ForcedTokens(_Lookup):
    """Proposes the tokens that a constrained answer has to have next ("jump ahead").

    Args:
        constraint: of the answer.
        eos_token_ids: nothing is drafted beyond them.
    """

    name = "grammar"

    def __init__(self, constraint: Constraint, eos_token_ids: Collection[int] = ()) -> None:
        super().__init__(eos_token_ids)
        self._constraint = constraint
        self._answer: list[int] = []

    def update(self, tokens: Sequence[int]) -> None:
        """See `Drafter`: the grammar goes on behind the answer."""
        self._answer += tokens

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        tokens = self._constraint.forced_tokens([*self._answer, *draft.token_ids])[:max_tokens]
        return self._candidate(draft, tokens, [1.0] * len(tokens))


class ReducedHead:
    """The shared exit with the rows of some tokens alone (FR-Spec, arXiv 2502.14856).

    On a small model the head costs as much as many layers. Only drafts use it; verification uses the
    whole vocabulary. Tokens outside have probability 0 in q, which is what acceptance sees.

    Args:
        decoder: whose final norm and head these are.
        token_ids: the tokens kept, in any order; repeated ones count once.

    Attributes:
        token_ids: [n] int64, the token of each logit.
        decoder: the decoder with this head, whose logits are [B, T, n].
    """

    def __init__(self, decoder: Decoder, token_ids: Iterable[int]) -> None:
        kept = frozenset(token_ids)
        self._kept: tuple[frozenset[int], ...] = (kept,)
        self.token_ids = torch.tensor(sorted(kept), device=decoder.device)
        self._vocab_size = decoder.architecture.vocab_size
        self.decoder = decoder.with_reduced_head(self.token_ids)

    @classmethod
    def of(
        cls, decoder: Decoder, token_ids: tuple[int, ...] | None, prompt: Iterable[int]
    ) -> "ReducedHead | None":
        """Return the head for a list of tokens and those of a prompt; None without a list.

        The list's part is kept for the next answer: each decoder has that of its last list.
        """
        if token_ids is None:
            return None
        ids, head = _LAST_HEAD.get(decoder, (None, None))
        if head is None or not (ids is token_ids or ids == token_ids):
            head = cls(decoder, token_ids)
            _LAST_HEAD[decoder] = token_ids, head
        return head.extend(decoder, prompt)

    def extend(self, decoder: Decoder, token_ids: Iterable[int]) -> "ReducedHead":
        """Return a head with more tokens, whose rows alone are new: a second, small product.

        Args:
            decoder: the whole one, which this head was made from.
            token_ids: those that are in it already add nothing.
        """
        new = frozenset(token_ids).difference(*self._kept)
        if not new:
            return self
        more, both = ReducedHead(decoder, new), copy.copy(self)
        both._kept = (*self._kept, new)
        both.token_ids = torch.cat([self.token_ids, more.token_ids])
        both.decoder = self.decoder.concat_heads(more.decoder)
        return both

    @property
    def share(self) -> float:
        """The number of its tokens over the vocabulary's."""
        return len(self.token_ids) / self._vocab_size

    def scatter(self, probabilities: Tensor) -> Tensor:
        """Spread probabilities of the tokens kept [..., n] over all tokens [..., V]."""
        whole = probabilities.new_zeros(*probabilities.shape[:-1], self._vocab_size)
        whole[..., self.token_ids] = probabilities
        return whole


_LAST_HEAD: "weakref.WeakKeyDictionary[Decoder, tuple[tuple[int, ...], ReducedHead]]" = (
    weakref.WeakKeyDictionary()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterInputs:
    """Inputs of the drafters of one generation.

    Attributes:
        decoder: the model.
        sampler: of the generation.
        prompts: token ids of each row.
        exit_layer: E, or None.
        head: a reduced-vocabulary head, or None.
        datastore: token ids or a table's file, or None.
        prediction: token ids of a predicted answer.
        constraint: of the answer, or None.
        eos_token_ids: tokens that end the answer.
        adaptive: whether a controller asks for confidences.
        adapter: an exit adapter of the model, or None.
        capacity: positions of prompt and answer at most.
    """

    decoder: Decoder
    sampler: Sampler
    prompts: Sequence[Sequence[int]]
    exit_layer: int | None = None
    head: ReducedHead | None = None
    datastore: Path | tuple[int, ...] | None = None
    prediction: Sequence[int] = ()
    constraint: Constraint | None = None
    eos_token_ids: Collection[int] = ()
    adaptive: bool = False
    adapter: ExitAdapterWeights | None = None
    capacity: int = 0


DRAFTERS: dict[str, Callable[[DrafterInputs], list[Drafter]]] = {}


def register_drafter(name: str, make: Callable[[DrafterInputs], list[Drafter]]) -> None:
    """Add a source of drafts: `draft_from=name` (or "name+early-exit", ...) uses what `make` returns."""
    DRAFTERS[name] = make


def make_drafters(sources: Sequence[str], inputs: DrafterInputs) -> list[Drafter]:
    """Return the drafters of some sources, in their order."""
    return [drafter for source in sources for drafter in DRAFTERS[source](inputs)]


def _early_exit(inputs: DrafterInputs) -> list[Drafter]:
    assert inputs.exit_layer is not None
    return [
        EarlyExit(
            inputs.decoder,
            inputs.exit_layer,
            inputs.sampler,
            inputs.head,
            with_confidence=inputs.adaptive,
        )
    ]


def _ngram(inputs: DrafterInputs) -> list[Drafter]:
    (prompt,) = inputs.prompts
    drafters: list[Drafter] = [Ngram(prompt, inputs.eos_token_ids)]
    datastore = Datastore.of(inputs.datastore, inputs.decoder.architecture.vocab_size)
    if datastore is not None:
        drafters.append(DatastoreLookup(datastore, inputs.eos_token_ids))
    return drafters


def _prediction(inputs: DrafterInputs) -> list[Drafter]:
    return [Prediction(inputs.prediction, inputs.eos_token_ids)]


def _grammar(inputs: DrafterInputs) -> list[Drafter]:
    assert inputs.constraint is not None
    return [ForcedTokens(inputs.constraint, inputs.eos_token_ids)]


register_drafter("grammar", _grammar)
register_drafter("prediction", _prediction)
register_drafter("early-exit", _early_exit)
register_drafter("n-gram", _ngram)
