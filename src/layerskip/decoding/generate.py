"""The step loop: plain, early exit, and self-speculative decoding of one prompt."""

import contextlib
import dataclasses
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from layerskip.decoding.accept import accept, accept_greedy
from layerskip.decoding.draft_costs import ContextCosts, DraftCosts
from layerskip.decoding.draft_length import DraftLength, NgramLength
from layerskip.decoding.draft_text import Datastore
from layerskip.decoding.drafters import Drafter, EarlyExitDrafter
from layerskip.decoding.ngram import NgramDrafter
from layerskip.decoding.pace import Pace
from layerskip.decoding.policy import Plan
from layerskip.decoding.prefix import Prefix
from layerskip.decoding.prompt import check_prompt
from layerskip.decoding.sampling import Sampling, TokenHistory, next_token, seeded_generator
from layerskip.decoding.short_head import ReducedHead
from layerskip.decoding.step import Ending, Step
from layerskip.model import NON_FINITE_MESSAGE, Decoder, KVCache

_T = TypeVar("_T")

PREFILL_CHUNK = 512  # positions a pass: bounds the memory of scores and masks for long prompts


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    plan: Plan,
    sampling: Sampling,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    seed: int | None = None,
    prefix: Prefix | None = None,
) -> Generator[Step]:
    """Continue a prompt, step by step, until an end token, `max_new_tokens` or the context's end.

    The first step comes from the prompt's own pass. An end token is the last token yielded. What the
    prompt shares with the text that `prefix` keeps is not computed again.

    Raises:
        PromptError: the prompt is empty, longer than the context, or has an id that is no token.
        ValueError: max_new_tokens is below 1.
    """
    check_prompt(decoder, prompt)
    ending = Ending.of(decoder, prompt, max_new_tokens, end_tokens)
    return _until_the_end(decoder, prompt, plan, sampling, ending, seed, prefix)


@torch.inference_mode()
def _until_the_end(
    decoder: Decoder,
    prompt: Sequence[int],
    plan: Plan,
    sampling: Sampling,
    ending: Ending,
    seed: int | None,
    prefix: Prefix | None,
) -> Generator[Step]:
    n_layers = plan.final_exit(len(decoder.layers))
    if prefix is None:
        cache = decoder.new_cache(ending.capacity)
    else:
        cache = prefix.cache_for(decoder, prompt, ending.capacity, n_layers, ending)
    ids = torch.tensor([list(prompt)], device=decoder.device)
    size = decoder.architecture.vocab_size
    history = TokenHistory(ids, size) if sampling.repetition_penalty != 1.0 else None
    generator = None if sampling.greedy else seeded_generator(decoder.device, seed)
    session = _Session(decoder, n_layers, plan, sampling, ending, ids, cache, history, generator)
    known = list(prompt)
    try:
        for step in outside_autocast(decoder.device, session.steps()):
            known += step.tokens
            if prefix is not None:
                prefix.keep(decoder, cache, known, n_layers, ending)
            yield ending.cut(step)
            if ending.reached:
                return
            if prefix is not None:
                prefix.resume(ending)
    except BaseException as error:
        if prefix is not None:  # after a failure there may be no numbers behind what is settled
            prefix.leave(ending, keeps=not isinstance(error, Exception))
        raise


def outside_autocast(device: torch.device, steps: Iterator[_T]) -> Iterator[_T]:
    """The same steps, computed in the model's own dtype where the caller's autocast takes another."""
    while True:
        is_on = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
            step = next(steps, None)
        if step is None:
            return
        yield step


def plain_step(
    decoder: Decoder,
    last: Tensor,
    n_layers: int,
    cache: KVCache,
    sampling: Sampling,
    generator: torch.Generator | None,
    history: TokenHistory | None = None,
) -> Tensor:
    """Plain decoding: the newest tokens [B, 1] through the first n layers, and those after them.

    The cache's lengths and a history are moved on, as by `speculate`.
    """
    draws = sampling.draws(generator)
    if history is None and (sampling.greedy or draws is not None):
        following = decoder.step(last, n_layers, cache, draws)
    else:
        hidden = decoder.run(decoder.embed(last), 0, n_layers, cache)
        seen = None if history is None else history.before(last[:, :0])
        following = next_token(decoder, hidden, sampling, generator, seen)
    cache.lengths += 1
    if history is not None:
        history.extend(following)
    return following


def speculate(
    decoder: Decoder,
    drafter: Drafter,
    last: Tensor,
    n: int,
    cache: KVCache,
    sampling: Sampling,
    generator: torch.Generator | None,
    history: TokenHistory | None = None,
) -> tuple[Tensor, list[Step]]:
    """One round: draft with layers [0, E), verify with [E, L), keep the agreeing prefix (section 4.3).

    Args:
        decoder: the model.
        drafter: proposes up to n tokens after `last`.
        last: [B, 1], each row's newest settled token, which no layer has seen yet.
        n: how many tokens to draft at most.
        cache: its lengths are moved on by what each row keeps.
        sampling: of the answers.
        generator: source of randomness for sampling.
        history: for the repetition penalty, of one row, which is moved on too; or None.

    Returns:
        The model's own token after what is kept [B, 1], and the step of each row.
    """
    draft = drafter.draft(last, n, cache, history, generator)
    if draft is None:  # as most rounds are where little can be drafted
        following = plain_step(
            decoder, last, len(decoder.layers), cache, sampling, generator, history
        )
        return following, [Step((token,)) for token in following[:, 0].tolist()]
    drafted, q = draft.tokens, draft.drawn_from
    if sampling.greedy and history is None:
        accepted, own = accept_greedy(drafted, decoder.verify(draft.states, draft.start, cache))
        following = own[:, None]
    else:
        hidden = decoder.run(draft.states, draft.start, len(decoder.layers), cache)
        seen = None if history is None else history.before(drafted)
        accepted, following = accept(drafted, q, decoder, hidden, sampling, generator, seen)
    # One synchronisation with the device a round.
    rows: list[list[int]] = torch.cat([drafted, following, accepted[:, None]], dim=1).tolist()
    cache.lengths += torch.tensor([row[-1] for row in rows], device="cpu") + 1
    if history is not None:  # by tokens that are on the device already
        history.extend(torch.cat([drafted[:, : rows[0][-1]], following], dim=1))
    return following, [draft.step(row) for row in rows]


def check_numbers(hidden: Tensor) -> None:
    """Raise ValueError where a prompt's last states are no numbers: nothing after them would be."""
    if not bool(torch.isfinite(hidden).all()):
        raise ValueError(NON_FINITE_MESSAGE)


@dataclasses.dataclass
class _Session:
    """The state of one generation: one cache, one history, one source of randomness."""

    decoder: Decoder
    n_layers: int  # that a token goes through before it is settled
    plan: Plan
    sampling: Sampling
    ending: Ending  # nothing is drafted beyond it
    prompt: Tensor  # [1, n]
    cache: KVCache
    history: TokenHistory | None
    generator: torch.Generator | None
    lengths: list[DraftLength | NgramLength] = dataclasses.field(default_factory=list)

    def steps(self) -> Iterator[Step]:
        """Yield steps without end; each has to go through `Ending.cut` before the next one.

        Those of early exit are plain steps of fewer layers.
        """
        decoder, plan = self.decoder, self.plan
        how = (self.cache, self.sampling, self.generator, self.history)
        drafter, costs = None, None
        if plan.mode == "self-speculative":
            prompt = self.prompt[0].tolist()
            head = ReducedHead.of(decoder, plan.draft_vocabulary, prompt)
            if plan.adaptive:
                costs = ContextCosts(decoder, plan.exit_layer, head, plan.costs)
            now = None if costs is None else costs.over([len(prompt)])
            drafter = self._drafter(prompt, head, now)
        last = self._prefill()
        step = Step((int(last),))
        while True:
            if drafter is not None:
                drafter.settle(step.tokens, step.accepted)
            yield step
            if drafter is None:
                last = plain_step(decoder, last, self.n_layers, *how)
                step = Step((int(last),))
            else:
                assert plan.draft_tokens is not None
                if costs is not None and (now := costs.grown(self.cache.lengths.tolist())):
                    for length in self.lengths:
                        length.costs = now
                n = min(plan.draft_tokens, self.ending.room - 1)
                last, (step,) = speculate(decoder, drafter, last, n, *how)

    def _drafter(
        self, prompt: list[int], head: ReducedHead | None, costs: DraftCosts | None
    ) -> Drafter:
        """What drafts; with costs it chooses how far."""
        plan, decoder, pace, early_exit = self.plan, self.decoder, Pace(), None
        if plan.draft_from != "n-gram":
            assert plan.exit_layer is not None
            length = None if costs is None else DraftLength(costs, pace, plan.trained)
            self.lengths += [] if length is None else [length]
            early_exit = EarlyExitDrafter(
                decoder, plan.exit_layer, self.sampling, head, length, self.ending.end_tokens
            )
            if plan.draft_from == "early-exit":
                return early_exit
        ngrams = None if costs is None else NgramLength(costs, pace)
        self.lengths += [] if ngrams is None else [ngrams]
        vocab_size, ends = decoder.architecture.vocab_size, self.ending.end_tokens
        text = Datastore.of(plan.draft_text, vocab_size)
        return NgramDrafter(decoder, self.sampling, prompt, early_exit, ngrams, ends, text)

    def _prefill(self) -> Tensor:
        """Run the prompt through the layers and choose the token after it, [1, 1]."""
        left = self.prompt[:, int(self.cache.lengths) :]  # the cache may hold its beginning
        for chunk in left.split(PREFILL_CHUNK, dim=1):
            hidden = self.decoder.run(self.decoder.embed(chunk), 0, self.n_layers, self.cache)
            self.cache.lengths += chunk.shape[1]
        check_numbers(hidden[:, -1:])
        seen = None if self.history is None else self.history.before(self.prompt[:, :0])
        token = next_token(self.decoder, hidden[:, -1:], self.sampling, self.generator, seen)
        if self.history is not None:
            self.history.extend(token)
        return token
