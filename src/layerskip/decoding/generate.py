"""The decoding loop: plain, early exit and self-speculative decoding of one prompt.

`speculate` is one round of the paper's section 4.3; `reference.py` has the same without a cache.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from layerskip.decoding.accept import accept_greedy, accept_sampled
from layerskip.decoding.config import DecodingConfig
from layerskip.decoding.constraint import Constraint
from layerskip.decoding.controller import ContextCosts, Controller, DraftController, FixedController
from layerskip.decoding.drafters import (
    Draft,
    Drafter,
    DrafterInputs,
    ReducedHead,
    StateReader,
    make_drafters,
)
from layerskip.decoding.exit_adapter import ExitAdapter
from layerskip.decoding.prefix_cache import Prefix, PrefixCache
from layerskip.decoding.prompt import check_prompt
from layerskip.decoding.sampling import LogitsMask, Sampler
from layerskip.decoding.shared_exit import ExitKey
from layerskip.model import NON_FINITE_MESSAGE, Decoder, KVCache, StepCosts
from layerskip.model.exit_adapter import ExitAdapterWeights

_T = TypeVar("_T")

PREFILL_CHUNK = 512  # positions a pass: bounds the memory of scores and masks for long prompts


@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens that one pass or round added to an answer.

    Attributes:
        tokens: at least one; the first `accepted` of them were drafted.
        drafted: number of drafted tokens, as far as the answer goes.
        accepted: number of leading drafted tokens that the model agreed with.
        sources: the drafter of each drafted token.
        rejected: the other drafted tokens: the one that the model corrected, and those after it.
        discarded: number of further tokens that the early exit proposed with too little confidence.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    sources: tuple[str, ...] = ()
    rejected: tuple[int, ...] = ()
    discarded: int = 0

    @property
    def source(self) -> str:
        """The drafter of the first drafted token, or "model" where nothing was drafted."""
        if self.sources:
            return self.sources[0]
        return "early-exit" if self.discarded else "model"

    @property
    def from_exit(self) -> int:
        """Number of tokens that the early exit drafted, wherever the answer ends."""
        return self.sources.count("early-exit")

    def first(self, n: int) -> "Step":
        """Return the step cut to its first n tokens, where the answer ends inside it.

        Drafted tokens beyond the end count neither as accepted nor as rejected.
        """
        if n >= len(self.tokens):
            return self
        return dataclasses.replace(
            self,
            tokens=self.tokens[:n],
            drafted=min(self.drafted, n),
            accepted=min(self.accepted, n),
            rejected=(),
        )


@dataclasses.dataclass
class StoppingCriteria:
    """The end of one answer, and how far away it is.

    Attributes:
        max_new_tokens: limit that `max_new_tokens` and the context allow.
        capacity: positions of prompt and answer that the layers see at most.
        eos_token_ids: tokens that end it.
        remaining: number of new tokens that it may still have.
        finished: True once it has ended.
    """

    max_new_tokens: int
    capacity: int
    eos_token_ids: Collection[int]
    remaining: int
    finished: bool = False

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        prompt: Sequence[int],
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> "StoppingCriteria":
        """Return the criteria of a prompt's answer."""
        # The last new token is never run through the model, so it needs no position.
        limit = min(max_new_tokens, decoder.architecture.max_context - len(prompt) + 1)
        return cls(limit, len(prompt) + limit - 1, eos_token_ids, remaining=limit)

    def truncate(self, step: Step) -> Step:
        """Return as much of the next step as belongs to the answer."""
        ends = (i for i, token in enumerate(step.tokens, 1) if token in self.eos_token_ids)
        kept = step.first(min(next(ends, self.max_new_tokens), self.remaining))
        self.remaining -= len(kept.tokens)
        is_end = kept.tokens[-1] in self.eos_token_ids or self.remaining == 0
        self.finished = self.finished or is_end
        return kept


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    config: DecodingConfig,
    *,
    eos_token_ids: Collection[int] = (),
    measured: StepCosts | None = None,
    prefix_cache: PrefixCache | None = None,
    adapter: ExitAdapterWeights | None = None,
    logits_mask: LogitsMask | None = None,
) -> Generator[Step]:
    """Continue a prompt, step by step, until an end token, `max_new_tokens` or the context's end.

    The first step comes from the prompt's own pass. An end token is the last token yielded.

    Args:
        decoder: the model.
        prompt: token ids.
        config: resolved (see `DecodingConfig.resolve`).
        eos_token_ids: tokens that end the answer.
        measured: costs that `layerskip tune` has measured, for adaptive drafts.
        prefix_cache: what it shares with the prompt is not computed again.
        adapter: an exit adapter of the model, for drafts from it.
        logits_mask: of constrained decoding; a `Constraint` where the config has a grammar.

    Raises:
        PromptError: the prompt is empty, longer than the context, or has an id outside the vocabulary.
    """
    row = Row(
        decoder,
        prompt,
        config,
        eos_token_ids=eos_token_ids,
        measured=measured,
        adapter=adapter,
        logits_mask=logits_mask,
    )
    return _until_the_end(row, prefix_cache)


@torch.inference_mode()
def _until_the_end(row: "Row", prefix_cache: PrefixCache | None) -> Generator[Step]:
    decoder, criteria = row.decoder, row.criteria
    if prefix_cache is None:
        cache = decoder.new_cache(criteria.capacity)
    else:
        cache = prefix_cache.cache_for(
            decoder, row.context, criteria.capacity, row.n_layers, criteria
        )
    try:
        for step in outside_autocast(decoder.device, _steps(row, cache)):
            if prefix_cache is not None:
                prefix_cache.keep(decoder, cache, row.context, row.n_layers, criteria)
            yield criteria.truncate(step)
            if criteria.finished:
                return
            if prefix_cache is not None:
                prefix_cache.resume(criteria)
    except BaseException as error:
        if prefix_cache is not None:  # after a failure the cache may hold anything
            prefix_cache.leave(criteria, keeps=not isinstance(error, Exception))
        raise


def _steps(row: "Row", cache: KVCache) -> Iterator[Step]:
    """Yield the steps of a row without end."""
    row.start(cache)
    step = None
    while step is None:
        step = row.prefill(PREFILL_CHUNK)
    while True:
        row.commit(step)
        yield step
        step = row.decode()


class Row:
    """One answer that is being decoded: its tokens, KV cache, sampler, drafters and controller.

    Args:
        decoder: the model.
        prompt: token ids.
        config: resolved (see `DecodingConfig.resolve`).
        eos_token_ids: tokens that end the answer.
        measured: see `generate`.
        adapter: see `generate`.
        logits_mask: see `generate`.
        num_logprobs: number of most likely tokens to report at each position (by `Batch`).

    Attributes:
        context: the prompt's tokens, and the answer's as far as they are committed.
        prompt_tokens: number of tokens of the prompt.
        n_layers: number of layers that decide every token.
        criteria: the end of the answer.
        cached_tokens: number of the prompt's tokens whose keys and values were copied.
        cache: of one row; its length is the number of tokens of `context` that the layers have seen.
        last: [1, 1], the newest token, which no layer has seen yet.
        reader: the drafter that gets the hidden states of committed positions, or None.
        exit_key: of the early exit or exit adapter that drafts; None without one.
        draft_layer: its E; None without one.

    Raises:
        PromptError: see `generate`.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        config: DecodingConfig,
        *,
        eos_token_ids: Collection[int] = (),
        measured: StepCosts | None = None,
        adapter: ExitAdapterWeights | None = None,
        logits_mask: LogitsMask | None = None,
        num_logprobs: int | None = None,
    ) -> None:
        check_prompt(decoder, prompt)
        if config.is_constrained and not isinstance(logits_mask, Constraint):
            raise ValueError("a JSON schema or regular expression needs a `Constraint`")
        self.decoder, self.config, self.context = decoder, config, list(prompt)
        self.prompt_tokens, self.num_logprobs = len(prompt), num_logprobs
        self.n_layers = config.num_layers_to_run(len(decoder.layers))
        self.criteria = StoppingCriteria.of(decoder, prompt, config.max_new_tokens, eos_token_ids)
        self.cached_tokens = 0
        self._measured, self._adapter, self._mask = measured, adapter, logits_mask

    def start(self, cache: KVCache) -> None:
        """Begin with a cache, which may hold the prompt's beginning."""
        decoder, config = self.decoder, self.config
        prompt = torch.tensor([self.context], device=decoder.device)
        size = decoder.architecture.vocab_size
        self.cache, self._prompt, self.last = cache, prompt, prompt[:, :0]
        self.sampler = Sampler(config, decoder.device, config.seed, prompt, size, self._mask)
        self.drafters: list[Drafter] = []
        self.controller: Controller | None = None
        self.exit_key: ExitKey | None = None
        if config.mode == "self-speculative":
            if config.exit_layer is not None and "early-exit" in config.draft_sources:
                ids = _interned(_ids(config.draft_vocabulary))
                self.exit_key = ExitKey(config.exit_layer, ids)
            elif self._adapter is not None and ExitAdapter.name in config.draft_sources:
                self.exit_key = ExitKey(self._adapter.settings.exit_layer, None, self._adapter)
            self.drafters, self.controller = _drafting(
                decoder,
                self.context,
                config,
                self.criteria,
                self._measured,
                self.sampler,
                self._adapter,
                self._mask if isinstance(self._mask, Constraint) else None,
            )
        readers = (drafter for drafter in self.drafters if isinstance(drafter, StateReader))
        self.reader: StateReader | None = next(readers, None)

    @property
    def draft_layer(self) -> int | None:
        """See the class."""
        return None if self.exit_key is None else self.exit_key.exit_layer

    @property
    def prompt_left(self) -> int:
        """Number of the prompt's tokens that the layers have not seen."""
        return max(self.prompt_tokens - int(self.cache.lengths), 0)

    def prompt_chunk(self, n: int) -> Tensor:
        """Return the next n tokens of the prompt, [1, n]."""
        start = int(self.cache.lengths)
        return self._prompt[:, start : start + n]

    @property
    def takes_argmax(self) -> bool:
        """True where the most likely token is all that is needed of the model's logits."""
        return self.sampler.takes_argmax and self.num_logprobs is None

    def prefix(self) -> Prefix:
        """Return the tokens that the layers have seen, with their keys and values."""
        length = int(self.cache.lengths)
        return Prefix(self.context[:length], self.cache, self.n_layers)

    def roll_back(self) -> None:
        """Set the cache back to the committed tokens, of which the layers have not seen the last."""
        self.cache.lengths.fill_(len(self.context) - 1)

    def max_draft_tokens(self) -> int:
        """Return the number of tokens that may be drafted in the next round."""
        return min(self.config.draft_tokens or 0, self.criteria.remaining - 1)

    def commit(self, step: Step) -> None:
        """Add a step's tokens to the context, and let sampler and drafters learn them."""
        self.context += step.tokens
        self.sampler.commit(step.tokens)
        for drafter in self.drafters:
            drafter.update(step.tokens)

    def prefill(self, n: int) -> Step | None:
        """Run the next n tokens of the prompt; return the first step if they are its last."""
        chunk, cache = self.prompt_chunk(n), self.cache
        embedded, reader = self.decoder.embed(chunk), self.reader
        exit_states, hidden = run_layers(self.decoder, embedded, 0, self.n_layers, cache, reader)
        if reader is not None:
            reader.read_states(exit_states, hidden)
        cache.lengths += chunk.shape[1]
        if self.prompt_left:
            return None
        check_finite(hidden[:, -1:])
        self.last = self.sampler.next_tokens(self.decoder, hidden[:, -1:])
        return Step((int(self.last),))

    def decode(self) -> Step:
        """Run the next round: a plain step, or draft and verify."""
        if self.controller is None:
            self.last = plain_step(
                self.decoder, self.last, self.n_layers, self.cache, self.sampler, self.reader
            )
            return Step((int(self.last),))
        draft = Draft(self.last, self.cache, self.context)
        self.last, step = speculate(
            self.decoder,
            self.controller,
            draft,
            self.max_draft_tokens(),
            self.sampler,
            self.config.exit_layer,
            self.reader,
        )
        return step


def _drafting(
    decoder: Decoder,
    prompt: Sequence[int],
    config: DecodingConfig,
    criteria: StoppingCriteria,
    measured: StepCosts | None,
    sampler: Sampler,
    adapter: ExitAdapterWeights | None,
    constraint: Constraint | None,
) -> tuple[list[Drafter], Controller]:
    """Return the drafters of a config, and the controller that chooses among them."""
    ends = criteria.eos_token_ids
    head = ReducedHead.of(decoder, _ids(config.draft_vocabulary), prompt)
    assert not isinstance(config.datastore, str)
    assert not isinstance(config.prediction, str)  # `LayerSkipModel.resolve` has made tokens of it
    inputs = DrafterInputs(
        decoder=decoder,
        sampler=sampler,
        prompts=[tuple(prompt)],
        exit_layer=config.exit_layer,
        head=head,
        datastore=config.datastore,
        prediction=config.prediction or (),
        constraint=constraint,
        eos_token_ids=ends,
        adaptive=bool(config.adaptive),
        adapter=adapter,
        capacity=criteria.capacity,
    )
    drafters = make_drafters(config.draft_sources, inputs)
    if not config.adaptive:
        return drafters, FixedController(drafters)
    layers = max((drafter.num_layers for drafter in drafters), default=0)
    share = max((drafter.head_share for drafter in drafters), default=0.0)
    costs = ContextCosts(decoder, layers, share, measured)
    controller = DraftController(drafters, costs, greedy=sampler.greedy, eos_token_ids=ends)
    return drafters, controller


def _ids(draft_vocabulary: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    assert not isinstance(draft_vocabulary, int)  # `resolve` has made tokens of it
    return draft_vocabulary


@functools.lru_cache(maxsize=8)
def _interned(ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the same object for equal draft vocabularies, which makes comparing them cheap."""
    return ids


def outside_autocast(device: torch.device, steps: Iterator[_T]) -> Iterator[_T]:
    """Compute steps in the model's own dtype where the caller's autocast takes another."""
    while True:
        is_on = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
            step = next(steps, None)
        if step is None:
            return
        yield step


def run_layers(
    decoder: Decoder,
    hidden: Tensor,
    start: int,
    n_layers: int,
    cache: KVCache,
    reader: StateReader | None,
) -> tuple[Tensor, Tensor]:
    """Run layers [start, n_layers), of which a reader gets the states that leave its layer E too.

    Returns:
        These states (without a reader, those that came in), and those that leave the last layer.
    """
    if reader is not None:
        hidden, start = decoder.run(hidden, start, reader.num_layers, cache), reader.num_layers
    return hidden, decoder.run(hidden, start, n_layers, cache)


def plain_step(
    decoder: Decoder,
    last: Tensor,
    n_layers: int,
    cache: KVCache,
    sampler: Sampler,
    reader: StateReader | None = None,
) -> Tensor:
    """Run the newest tokens [B, 1] through layers [0, n_layers) and choose the next ones, [B, 1]."""
    if sampler.takes_argmax and (reader is None or not reader.num_layers):
        hidden, following, _ = decoder.greedy_step(last, n_layers, cache)
        if reader is not None:
            reader.read_states(decoder.embed(last), hidden)
    else:
        embedded = decoder.embed(last)
        exit_states, hidden = run_layers(decoder, embedded, 0, n_layers, cache, reader)
        following = sampler.next_tokens(decoder, hidden)
        if reader is not None:
            reader.read_states(exit_states, hidden)
    cache.lengths += 1
    return following


def speculate(
    decoder: Decoder,
    controller: Controller,
    draft: Draft,
    max_tokens: int,
    sampler: Sampler,
    exit_layer: int | None,
    reader: StateReader | None = None,
) -> tuple[Tensor, Step]:
    """Decode one round of self-speculative decoding (section 4.3 of the paper).

    Args:
        decoder: the model.
        controller: fills the draft.
        draft: empty, behind the newest committed token; its cache moves on by what is kept.
        max_tokens: number of tokens to draft at most.
        sampler: of the generation.
        exit_layer: E; None without an early exit.
        reader: the drafter that gets the states of what is kept; its E replaces `exit_layer`.

    Returns:
        The model's own token after what is accepted [1, 1], and the step.
    """
    cache, n_layers = draft.cache, len(decoder.layers)
    exit_layer = exit_layer if reader is None else reader.num_layers

    # 1. Draft: as many tokens as the controller thinks worth their cost.
    controller.fill(draft, max_tokens)
    tokens = draft.tokens
    if not len(draft) and not draft.states:
        following = plain_step(decoder, draft.last, n_layers, cache, sampler, reader)
        step = Step(tuple(following[0].tolist()))
        controller.update(draft, step.tokens, 0)
        return following, step

    # 2. Verify: the remaining layers over all d + 1 positions, in one pass.
    hidden, start = draft.hidden_states(decoder, exit_layer)
    target: Tensor | None = None
    if sampler.takes_argmax and (reader is None or reader.num_layers == start):
        exit_states, layers = hidden, (start, n_layers)
        hidden, target, _ = decoder.greedy_pass(hidden, layers, cache, n_scored=hidden.shape[1])
    else:
        exit_states, hidden = run_layers(decoder, hidden, start, n_layers, cache, reader)
        if sampler.greedy:
            target = sampler.target_tokens(decoder, hidden, tokens)

    # 3. Accept, and choose the model's own token. One synchronization with the device a round.
    ids: list[int]
    if target is not None:  # the longest prefix that agrees with the model
        ids = torch.cat([tokens, target], dim=1)[0].tolist()
        drafted, own = ids[: len(draft)], ids[len(draft) :]
        accepted = accept_greedy(drafted, own)
        following, next_token = target[:, accepted : accepted + 1], own[accepted]
    else:
        q = draft.all_probs(decoder.architecture.vocab_size)
        p = sampler.target_probs(decoder, hidden, tokens)
        counts, next_tokens = accept_sampled(tokens, q, p, sampler.generator)
        following = next_tokens[:, None]
        ids = torch.cat([tokens, following, counts[:, None]], dim=1)[0].tolist()
        *drafted, next_token, accepted = ids

    # 4. Roll back the cache: its length moves on by what is kept.
    cache.lengths += accepted + 1
    if reader is not None:
        reader.read_states(exit_states[:, : accepted + 1], hidden[:, : accepted + 1])
    step = step_of(draft, drafted, next_token, accepted)
    controller.update(draft, step.tokens, accepted)
    return following, step


def step_of(draft: Draft, drafted: list[int], following: int, accepted: int) -> Step:
    """Return the step of a verified draft: its accepted tokens, and the model's own after them."""
    return Step(
        tokens=(*drafted[:accepted], following),
        drafted=len(drafted),
        accepted=accepted,
        sources=tuple(draft.sources),
        rejected=tuple(drafted[accepted:]),
        discarded=draft.discarded,
    )


@torch.inference_mode()
def iter_exit_hidden_states(
    decoder: Decoder, tokens: Tensor, exits: Collection[int], capacity: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Run tokens through the layers once and yield the hidden states at some exits.

    `decoder.logits(hidden)` gives the early exit's logits: row t predicts token t + 1.
    Apply it to parts of long texts; logits of all positions at once are large.

    Args:
        decoder: the model.
        tokens: [B, T]. Rows may be padded on the right: no position sees those after it.
        exits: layers run, each 0 (the embedding) to L.
        capacity: of the cache, T or more, which some rotary embeddings go by; None = T.

    Yields:
        The first position, the exit, and the hidden states [B, t, D] of t positions there, before the
        final norm; for each piece of the positions all exits in ascending order.

    Raises:
        ValueError: an id that is no token.
    """
    b, t = tokens.shape
    size = decoder.architecture.vocab_size
    if t and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"a token id is outside the vocabulary (0 to {size - 1})")
    cache = decoder.new_cache(max(t, capacity or t), b)
    exit_layers = sorted(set(exits))
    for first in range(0, t, PREFILL_CHUNK):
        chunk = tokens[:, first : first + PREFILL_CHUNK]
        hidden, start = decoder.embed(chunk), 0
        for e in exit_layers:
            hidden, start = decoder.run(hidden, start, e, cache), e
            yield first, e, hidden
        cache.lengths += chunk.shape[1]


def check_finite(hidden: Tensor) -> None:
    """Raise ValueError where hidden states of a prompt are NaN or infinite."""
    if not bool(torch.isfinite(hidden).all()):
        raise ValueError(NON_FINITE_MESSAGE)
