"""Continuous batching: rows join and leave between rounds, and each accepts its own number of tokens.

`Batch.step` is one round: `schedule` chooses the rows and the pieces of their prompts, `run` drafts and
computes all their positions in one pass, `postprocess` accepts, stops and frees. A row alone runs the
code of `generate`.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layerskip.decoding.accept import accept_greedy, accept_sampled
from layerskip.decoding.controller import BatchController, ContextCosts, RowDraft
from layerskip.decoding.drafters import Draft
from layerskip.decoding.generate import PREFILL_CHUNK, Row, Step, check_finite, step_of
from layerskip.decoding.prefix_cache import PrefixPool
from layerskip.decoding.sampling import TokenLogprobs, token_logprobs
from layerskip.decoding.shared_exit import SharedExit
from layerskip.model import Decoder, KVCache, StepCosts, argmax

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """The result of a round for one row.

    Attributes:
        row: the row.
        step: its new tokens, as far as they belong to the answer; None for an error.
        logprobs: one for each token, where the row asks for them.
        error: of this row, which has left.
    """

    row: Row
    step: Step | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: Exception | None = None


@dataclasses.dataclass(eq=False)
class RowPass:
    """The part that one row has in a pass over all rows.

    Attributes:
        row: the row.
        draft: of a row that decodes; None for a piece of a prompt.
        tokens: [1, n], those that the layers have not seen.
        hidden: their hidden states, as far as they have come; at the end [1, d + 1, D], those of the
            positions that a choice follows.
        target: [1, d + 1], the model's greedy choices, where they are all that is needed.
        logits: [1, d + 1, V], else.
        exit_states: hidden states that left the layer E of the row's reader.
    """

    row: Row
    draft: Draft | None
    tokens: Tensor
    hidden: Tensor
    target: Tensor | None = None
    logits: Tensor | None = None
    exit_states: Tensor | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers where the pass changes: where the early exit's states join it, and its end."""
        if self.draft is None or not self.draft.states or self.row.draft_layer is None:
            return (self.row.n_layers,)
        return self.row.draft_layer, self.row.n_layers

    def join_states(self, n_layers: int) -> None:
        """Put the early exit's hidden states in front, where the others have come as far."""
        if self.draft is not None and self.draft.states and n_layers == self.row.draft_layer:
            self.hidden = torch.cat([*self.draft.states, self.hidden], dim=1)
            self.row.roll_back()
        if self.row.reader is not None and n_layers == self.row.reader.num_layers:
            self.exit_states = self.hidden

    def hand_over(self, n: int) -> None:
        """Give the states of the first n positions, which are committed, to the row's reader."""
        if self.row.reader is not None and self.exit_states is not None:
            self.row.reader.read_states(self.exit_states[:, :n], self.hidden[:, :n])


class Batch:
    """Rows that are continued together, each with its own options, cache and length.

    Args:
        decoder: the model.
        max_num_seqs: number of rows at once, others wait; None = `MAX_ROWS`.
        kv_cache_tokens: positions of all caches, prefixes kept for reuse included; None = no limit.
        prefill_chunk: tokens of prompts computed in a round.
        reuse_prefixes: whether prompts copy what they share with running and ended answers.
        measured: see `generate`.

    Attributes:
        waiting: rows that have not begun.
        running: rows that have.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_num_seqs: int | None = None,
        kv_cache_tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = False,
        measured: StepCosts | None = None,
    ) -> None:
        self._decoder, self._measured = decoder, measured
        self._max_num_seqs = max_num_seqs or MAX_ROWS
        self._kv_cache_tokens = kv_cache_tokens
        self._prefill_chunk = prefill_chunk
        self.waiting: collections.deque[Row] = collections.deque()
        self.running: list[Row] = []
        self._prefixes = PrefixPool(decoder) if reuse_prefixes else None
        self._controller = BatchController()
        self._costs = ContextCosts(decoder, None, 1.0, measured)
        self._exit: SharedExit | None = None
        self._drafts: dict[Row, RowDraft] = {}

    def add(self, row: Row) -> None:
        """Let a row wait for its turn.

        Raises:
            ValueError: its prompt and answer can never fit.
        """
        self.check_fit(row)
        self.waiting.append(row)

    def check_fit(self, row: Row) -> None:
        """Raise ValueError where a row's prompt and answer can never fit."""
        needed, total = row.criteria.capacity, self._kv_cache_tokens
        if total is not None and needed > total:
            raise ValueError(
                f"prompt and answer may have {needed} tokens, the KV cache holds {total}; shorten the"
                " prompt or lower max_new_tokens"
            )

    def remove(self, row: Row) -> None:
        """End a row between two rounds, as at a stop string; its prefix is kept for reuse."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.running:
            self._leave(row)

    @property
    def active_tokens(self) -> int:
        """Positions reserved by running rows."""
        return sum(row.criteria.capacity for row in self.running)

    @property
    def used_tokens(self) -> int:
        """Positions reserved by running rows and held by prefixes kept for reuse."""
        return self.active_tokens + (self._prefixes.positions if self._prefixes else 0)

    def __iter__(self) -> Iterator[Output]:
        """Yield the outputs of all rounds, until no row is left."""
        while self.waiting or self.running:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Run one round."""
        with torch.autocast(self._decoder.device.type, enabled=False):
            outputs, scheduled = self.schedule()
            if len(scheduled) == 1 and scheduled[0][0].num_logprobs is None:
                return outputs + self._run_alone(*scheduled[0])
            lengths = [int(row.cache.lengths) for row, _ in scheduled]
            try:
                passes = self.run(scheduled)
            except Exception:  # of one row, which ends; the others go on
                for (row, n), length in zip(scheduled, lengths, strict=True):
                    row.cache.lengths.fill_(length)
                    outputs += self._run_isolated(row, n)
                return outputs
            return outputs + self.postprocess(passes)

    def schedule(self) -> tuple[list[Output], list[tuple[Row, int]]]:
        """Let rows join while there is room, and divide the round's prompt tokens among them.

        Returns:
            Rows that could not begin, and the rows of the round with the number of prompt tokens that
            each computes; 0 for a row that decodes.
        """
        failed, scheduled = list[Output](), list[tuple[Row, int]]()
        while self.waiting and len(self.running) < self._max_num_seqs:
            needed, total = self.waiting[0].criteria.capacity, self._kv_cache_tokens
            if total is not None and self.active_tokens + needed > total:
                break
            row = self.waiting.popleft()
            self._free(needed)
            try:
                row.start(self._decoder.new_cache(needed))
            except Exception as error:
                failed.append(Output(row, error=error))
            else:
                self.running.append(row)
        budget = self._prefill_chunk
        for row in self.running:
            if not row.prompt_left:
                scheduled.append((row, 0))
            elif budget:
                if self._prefixes is not None and not row.cache.lengths:
                    others = [other.prefix() for other in self.running if other is not row]
                    row.cached_tokens = self._prefixes.take(
                        row.context, row.cache, row.n_layers, others
                    )
                n = min(row.prompt_left, budget)
                scheduled.append((row, n))
                budget -= n
        return failed, scheduled

    def run(self, scheduled: Sequence[tuple[Row, int]]) -> list[RowPass]:
        """Draft, and compute the positions of all rows in one pass; no token is committed.

        Returns:
            The rows for which tokens can be chosen: all but those inside their prompt.
        """
        # 1. Draft: the look-ups' proposals and the early exit's tokens that are worth their cost.
        decoding = [row for row, n in scheduled if not n]
        self._drafts = self._draft(decoding, sum(n for _, n in scheduled)) if decoding else {}
        drafts = [None if n else self._drafts[row].draft for row, n in scheduled]
        tokens = [
            row.prompt_chunk(n) if draft is None else draft.take_pending()
            for (row, n), draft in zip(scheduled, drafts, strict=True)
        ]

        # 2. Verify: all layers that the tokens have not been through, together with pieces of prompts.
        embedded = self._decoder.embed(torch.cat(tokens, dim=1))
        parts = embedded.split([part.shape[1] for part in tokens], dim=1)
        passes = [
            RowPass(row, *rest)
            for (row, _), *rest in zip(scheduled, drafts, tokens, parts, strict=True)
        ]
        self._run_layers(passes)

        # 3. Logits, or only the most likely tokens.
        choosing = [one for one in passes if not one.row.prompt_left]
        greedy = [one for one in choosing if one.row.takes_argmax]
        others = [one for one in choosing if not one.row.takes_argmax]
        for one, target in zip(greedy, _of_each(greedy, self._decoder.greedy_tokens), strict=True):
            one.target = target
        for one, logits in zip(others, _of_each(others, self._decoder.logits), strict=True):
            one.logits = logits
        return choosing

    def postprocess(self, passes: Sequence[RowPass]) -> list[Output]:
        """Accept what each row agrees with; rows that end leave."""
        outputs, verified = list[Output](), list[tuple[RowDraft, Step]]()
        for one in passes:
            try:
                step = _accept(one)
                one.row.commit(step)
            except Exception as error:
                outputs.append(self._fail(one.row, error))
                continue
            if one.draft is not None:
                verified.append((self._drafts[one.row], step))
            outputs.append(self._output(one.row, step, one.logits))
        if verified:
            self._controller.update(verified)
        return outputs

    def _draft(self, rows: Sequence[Row], prompt_positions: int) -> dict[Row, RowDraft]:
        """Return the drafts of all rows that decode."""
        exit_ = self._shared_exit(rows)
        drafts = {
            row: RowDraft(
                Draft(row.last, row.cache, row.context),
                row.controller,
                row.sampler,
                row.max_draft_tokens(),
                exit_ is not None and row.exit_key == exit_.key,
                row.reader,
            )
            for row in rows
        }
        if exit_ is not None:
            exit_.set_prompts([row.context for row in rows if drafts[row].shares_exit])
        costs = self._costs.at(*(len(row.context) for row in rows))
        self._controller.fill(list(drafts.values()), exit_, costs, prompt_positions)
        return drafts

    def _shared_exit(self, rows: Sequence[Row]) -> SharedExit | None:
        """Return the exit that the rows draft with: the one before, or that of the first row."""
        keys = [row.exit_key for row in rows if row.exit_key is not None]
        if not keys:
            return None
        if self._exit is None or self._exit.key not in keys:
            self._exit = SharedExit(self._decoder, keys[0])
            self._costs = ContextCosts(
                self._decoder, keys[0].exit_layer, self._exit.head_share, self._measured
            )
        return self._exit

    def _run_layers(self, passes: Sequence[RowPass]) -> None:
        """Run each row's hidden states to its last layer.

        Drafts of the early exit go on from the states that left layer E, all else begins at layer 0;
        from any layer on, the rows that have come so far are one pass.
        """
        exit_depths = (one.row.reader.num_layers for one in passes if one.row.reader is not None)
        depths = sorted({0, *exit_depths, *(depth for one in passes for depth in one.depths)})
        for start, stop in itertools.pairwise(depths):
            for one in passes:
                one.join_states(start)
            going = [one for one in passes if one.row.n_layers >= stop and one.hidden.shape[1]]
            rows = [(one.row.cache, one.hidden.shape[1]) for one in going]
            through = functools.partial(self._through, start=start, stop=stop, rows=rows)
            for one, hidden in zip(going, _of_each(going, through), strict=True):
                one.hidden = hidden
        for one in passes:
            one.join_states(depths[-1])
            if one.draft is None:
                one.row.cache.lengths += one.tokens.shape[1]
                one.hand_over(one.tokens.shape[1])
                one.hidden = one.hidden[:, -1:]

    def _through(
        self, hidden: Tensor, *, start: int, stop: int, rows: Sequence[tuple[KVCache, int]]
    ) -> Tensor:
        return self._decoder.run_rows(hidden[0], start, stop, rows)[None]

    def _run_alone(self, row: Row, prompt_chunk: int) -> list[Output]:
        """Run a round of the only row, as `generate` does."""
        try:
            step = row.prefill(prompt_chunk) if prompt_chunk else row.decode()
            if step is not None:
                row.commit(step)
        except Exception as error:
            return [self._fail(row, error)]
        return [] if step is None else [self._output(row, step)]

    def _run_isolated(self, row: Row, prompt_chunk: int) -> list[Output]:
        """Run a failed round again for one row by itself."""
        try:
            passes = self.run([(row, prompt_chunk)])
        except Exception as error:
            return [self._fail(row, error)]
        return self.postprocess(passes)

    def _output(self, row: Row, step: Step, logits: Tensor | None = None) -> Output:
        """Return what was committed, as far as the answer goes; a row that ends leaves."""
        step, logprobs = row.criteria.truncate(step), None
        if row.num_logprobs is not None and logits is not None:
            logprobs = token_logprobs(logits[0, : len(step.tokens)], step.tokens, row.num_logprobs)
        if row.criteria.finished:
            self._leave(row)
        return Output(row, step, logprobs)

    def _fail(self, row: Row, error: Exception) -> Output:
        self._leave(row, keeps=False)
        return Output(row, error=error)

    def _leave(self, row: Row, *, keeps: bool = True) -> None:
        self.running.remove(row)
        if self._prefixes is not None and keeps:
            self._prefixes.add(row.prefix())
            self._free(0)

    def _free(self, needed: int) -> None:
        """Forget prefixes until so many positions are free."""
        if self._prefixes is not None and self._kv_cache_tokens is not None:
            self._prefixes.shrink(self._kv_cache_tokens - self.active_tokens - needed)


def _of_each(passes: Sequence[RowPass], function: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
    """Apply a function to the hidden states of all rows at once, [1, N, D] to [1, N, ...]."""
    if not passes:
        return ()
    hidden = torch.cat([one.hidden for one in passes], dim=1)
    return function(hidden).split([one.hidden.shape[1] for one in passes], dim=1)


def _accept(one: RowPass) -> Step:
    """Keep what the model agrees with of a row's draft, and choose the token after it."""
    row, draft, sampler = one.row, one.draft, one.row.sampler
    if draft is None:
        check_finite(one.hidden)
    if draft is None or not len(draft):
        row.last = _next_token(one)
        if draft is None:
            return Step((int(row.last),))
        row.cache.lengths += 1
        one.hand_over(1)
        return step_of(draft, [], int(row.last), 0)
    tokens = draft.tokens
    if sampler.greedy:
        target = one.target
        if target is None:
            assert one.logits is not None
            target = argmax(sampler.process(one.logits, tokens))
        ids: list[int] = torch.cat([tokens, target], dim=1)[0].tolist()
        n = accept_greedy(ids[: len(draft)], ids[len(draft) :])
        following = target[:, n]
    else:
        assert one.logits is not None
        q = draft.all_probs(one.logits.shape[-1])
        p = sampler.probs_of(one.logits, tokens)
        accepted, following = accept_sampled(tokens, q, p, sampler.generator)
        n = int(accepted)
    row.last = following[:, None]
    row.cache.lengths += n + 1
    one.hand_over(n + 1)
    return step_of(draft, tokens[0].tolist(), int(following), n)


def _next_token(one: RowPass) -> Tensor:
    """Choose the token after a row's last position, [1, 1]."""
    if one.target is not None:
        return one.target
    assert one.logits is not None
    sampler, nothing = one.row.sampler, one.tokens[:, :0]
    if sampler.greedy:
        return argmax(sampler.process(one.logits, nothing))
    return sampler.sample(sampler.probs_of(one.logits, nothing)(0, 1)[:, 0])[:, None]
