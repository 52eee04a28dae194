"""`DraftController`: decides how far to draft, and from which source.

A round that drafts d tokens costs `draft(d) + verify(d + 1)` and yields the accepted tokens and one
more. Rounds follow one another, so the best rule is that of renewal-reward processes: with R the tokens
that a unit of time yields on average, draft one more token while its probability of acceptance is at
least R times its marginal cost. R and the probabilities are learned while the answer is generated, from
tokens and known costs alone; nothing is timed, so the same prompt is always decoded in the same way.
"""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Protocol

from layerskip.decoding.drafters import Candidate, Draft, Drafter, StateReader, draft_by
from layerskip.decoding.exit_adapter import head_share
from layerskip.decoding.sampling import Sampler
from layerskip.decoding.shared_exit import SharedExit
from layerskip.model import Decoder, StepCosts
from layerskip.model.draft_rule import CONFIDENCE_BINS, DraftRule, bin_of
from layerskip.model.exit_adapter import ExitAdapterWeights
from layerskip.model.step_timing import FAR, PassCosts, pass_costs

# Constants set by hand; benchmarks/results/draft-constants.json has the ablation of each.
PRIOR_WEIGHT = 3.0  # tokens that a drafter's own confidence counts as
EXIT_ACCEPTANCE, EXIT_ACCEPTANCE_WEIGHT = 0.8, 2.0  # prior of an early exit's mean acceptance
MEMORY = 0.95  # decay of tokens and times a round
PLAIN_ROUNDS = 4.0  # prior of the throughput
BACKOFF_ROUNDS, MAX_BACKOFF_ROUNDS = 1, 32
LOOKAHEAD = 8  # tokens that are considered behind the next one


class Controller(Protocol):
    """Fills the draft of a round and learns from its verification."""

    def fill(self, draft: Draft, max_tokens: int) -> None:
        """Extend an empty draft by up to `max_tokens` tokens."""
        ...

    def update(self, draft: Draft, committed: Sequence[int], accepted: int) -> None:
        """Learn what was committed in this round, and how many drafted tokens were accepted."""
        ...


class FixedController:
    """Drafts as much as it may: a proposal of the first look-up that has one, else layer by layer.

    Args:
        drafters: in order of preference among those without layers.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._lookups = [drafter for drafter in drafters if not drafter.head_share]
        self._exit = next((drafter for drafter in drafters if drafter.head_share), None)

    def look_up(self, draft: Draft, max_tokens: int) -> None:
        """Draft a look-up's proposal, if one has any."""
        for drafter in self._lookups:
            candidate = drafter.propose(draft, max_tokens)
            if len(candidate):
                draft.extend(candidate, len(candidate), drafter.name)
                return

    def fill(self, draft: Draft, max_tokens: int) -> None:
        """See `Controller`."""
        self.look_up(draft, max_tokens)
        if self._exit is not None and not len(draft):
            for _ in range(max_tokens):
                draft.extend(self._exit.propose(draft, 1), 1, self._exit.name)

    def update(self, draft: Draft, committed: Sequence[int], accepted: int) -> None:
        """Learn nothing."""


class Throughput:
    """Tokens and time of rounds as moving averages; it begins as some rounds of plain decoding."""

    def __init__(self) -> None:
        self._tokens = self._time = PLAIN_ROUNDS

    @property
    def rate(self) -> float:
        """Tokens a unit of time, at least the 1 of plain decoding."""
        return max(1.0, self._tokens / self._time)

    def update(self, tokens: float, time: float) -> None:
        """Add a round."""
        self._tokens = MEMORY * self._tokens + tokens
        self._time = MEMORY * self._time + time


class Backoff:
    """Pauses a source whose rounds are slower than plain decoding, longer each time."""

    def __init__(self) -> None:
        self._rounds, self._left = BACKOFF_ROUNDS, 0
        self._gain = 0.0  # tokens beyond the time of its rounds

    def next_round(self) -> bool:
        """Begin a round; return whether the source may draft in it."""
        if self._left:
            self._left -= 1
            return False
        return True

    def update(self, tokens: float, time: float) -> None:
        """Add a round in which the source drafted."""
        self._gain = MEMORY * self._gain + tokens - time
        self.judge(self._gain >= 0)

    def judge(self, pays: bool) -> None:
        """End a row of pauses, or begin the next one."""
        if pays:
            self._rounds = BACKOFF_ROUNDS
        else:
            self._left = self._rounds
            self._rounds = min(2 * self._rounds, MAX_BACKOFF_ROUNDS)


class Acceptance:
    """Probability of acceptance by source and confidence.

    The prior is what a drafter has measured before, else the confidence itself.

    Args:
        drafters: those of the generation.
    """

    def __init__(self, drafters: Sequence[Drafter] = ()) -> None:
        self._accepted: dict[tuple[str, int], float] = {}
        self._verified: dict[tuple[str, int], float] = {}
        self._tables: dict[str, list[float]] = {}
        self._priors = {d.name: d.prior for d in drafters if d.prior is not None}
        measured = next((drafter.prior for drafter in drafters if drafter.head_share), None)
        mean = EXIT_ACCEPTANCE if measured is None else measured.mean
        self.exit_accepted = mean * EXIT_ACCEPTANCE_WEIGHT
        self.exit_verified = EXIT_ACCEPTANCE_WEIGHT

    def of(self, source: str, confidence: float) -> float:
        """Return the probability that a token is accepted if all before it are."""
        return self.table(source)[bin_of(confidence, CONFIDENCE_BINS)]

    def table(self, source: str) -> list[float]:
        """Return the probability for each bin of confidence."""
        if source not in self._tables:
            self._tables[source] = [self._probability(source, i) for i in range(CONFIDENCE_BINS)]
        return self._tables[source]

    def _probability(self, source: str, index: int) -> float:
        prior = (index + 0.5) / CONFIDENCE_BINS
        if (measured := self._priors.get(source)) is not None:
            accepted, verified = measured.accepted[index], measured.verified[index]
            prior = (PRIOR_WEIGHT * prior + accepted) / (PRIOR_WEIGHT + verified)
        accepted_now = self._accepted.get((source, index), 0.0)
        verified_now = self._verified.get((source, index), 0.0)
        return (PRIOR_WEIGHT * prior + accepted_now) / (PRIOR_WEIGHT + verified_now)

    def update(self, source: str, confidence: float, accepted: bool) -> None:
        """Add a verified token."""
        key = source, bin_of(confidence, CONFIDENCE_BINS)
        self._accepted[key] = self._accepted.get(key, 0.0) + accepted
        self._verified[key] = self._verified.get(key, 0.0) + 1
        self.table(source)[key[1]] = self._probability(*key)

    @property
    def exit_mean(self) -> float:
        """Mean acceptance of the early exit's tokens."""
        return self.exit_accepted / self.exit_verified


class DraftController:
    """Chooses the next part of a draft by the renewal-reward rule, for one row.

    A draft begins with the best prefix of the look-ups' proposals if its value is at least that of a
    token of the early exit. The early exit drafts the rest, until another token has no positive value.
    The value is the expected number of accepted tokens minus R times the cost, including what may be
    drafted afterwards.

    Args:
        drafters: those of the generation; at most one of them runs layers.
        costs: of this decoder, in plain steps.
        greedy: whether a discarded token can be compared with the model's own.
        eos_token_ids: nothing is drafted beyond them.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        costs: "ContextCosts",
        *,
        greedy: bool,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._lookups = [drafter for drafter in drafters if not drafter.head_share]
        self._exit = next((drafter for drafter in drafters if drafter.head_share), None)
        self._context_costs, self._greedy, self._eos_token_ids = costs, greedy, eos_token_ids
        self._throughput, self._acceptance = Throughput(), Acceptance(drafters)
        self._backoff = {drafter.name: Backoff() for drafter in drafters}

    @property
    def acceptance(self) -> Acceptance:
        """Learned from the drafts of this row."""
        return self._acceptance

    def _begin(self, max_tokens: int) -> None:
        self._survival, self._max_tokens = 1.0, max_tokens
        self._scored = 0  # tokens that the early exit proposed
        self._discarded: tuple[int, float] | None = None
        self._proposals: list[tuple[str, Candidate]] = []

    def look_up(self, draft: Draft, max_tokens: int) -> tuple[str, Candidate, list[float]] | None:
        """Begin a round of a batch: return the proposal of most accepted tokens expected.

        Returns:
            Its source, the proposal, and the probability that each token is accepted with all before
            it; None where no look-up has a proposal.
        """
        self._begin(max_tokens)
        best: tuple[str, Candidate, list[float]] | None = None
        for drafter in self._lookups:
            candidate = drafter.propose(draft, max_tokens)
            if not len(candidate):
                continue
            self._proposals.append((drafter.name, candidate))
            survival, survivals = 1.0, list[float]()
            for confidence in candidate.confidences:
                survival *= self._acceptance.of(drafter.name, confidence)
                survivals.append(survival)
            if best is None or sum(survivals) > sum(best[2]):
                best = drafter.name, candidate, survivals
        return best

    def fill(self, draft: Draft, max_tokens: int) -> None:
        """See `Controller`."""
        self._costs = self._context_costs.at(len(draft.context))
        self._begin(max_tokens)
        active = {name for name, backoff in self._backoff.items() if backoff.next_round()}
        lookups = [drafter for drafter in self._lookups if drafter.name in active]
        exit_ = self._exit if self._exit is not None and self._exit.name in active else None
        rule = None if exit_ is None else self._rule(exit_)
        source, candidate, n, value = self._best_proposal(draft, lookups, rule)
        if candidate is not None and (rule is None or value >= rule.value(1.0, 0)):
            for confidence in candidate.confidences[:n]:
                self._survival *= self._acceptance.of(source, confidence)
            draft.extend(candidate, n, source)
            draft.token_ids += candidate.token_ids[:n]
        if exit_ is not None and rule is not None and len(draft) < max_tokens:
            self._draft_by_exit(draft, exit_, rule)

    def _rule(self, exit_: Drafter) -> DraftRule:
        costs = self._costs
        return DraftRule(
            rate=self._throughput.rate,
            mean=self._acceptance.exit_mean,
            acceptance=self._acceptance.table(exit_.name),
            costs=costs.of_tokens(self._max_tokens),
            head=costs.head,
            overhead=costs.overhead,
            lookahead=LOOKAHEAD,
            ends=self._eos_token_ids,
        )

    def _best_proposal(
        self, draft: Draft, lookups: Sequence[Drafter], rule: DraftRule | None
    ) -> tuple[str, Candidate | None, int, float]:
        """Return the source, proposal, length and value of the most valuable prefix of all look-ups."""
        best: tuple[str, Candidate | None, int, float] = ("", None, 0, 0.0)
        rate = self._throughput.rate
        for drafter in lookups:
            candidate = drafter.propose(draft, self._max_tokens)
            if not len(candidate):
                continue
            self._proposals.append((drafter.name, candidate))
            survival, tokens = 1.0, 0.0
            for n, confidence in enumerate(candidate.confidences, 1):
                survival *= self._acceptance.of(drafter.name, confidence)
                tokens += survival
                value = tokens - rate * self._costs.rows(1, n)
                if rule is not None:
                    value += rule.future(survival, n)
                if value > best[3]:
                    best = drafter.name, candidate, n, value
        return best

    def _draft_by_exit(self, draft: Draft, exit_: Drafter, rule: DraftRule) -> None:
        """Draft the rest with the early exit."""
        n, ids = len(draft), draft.token_ids
        if n:
            if ids[-1] in self._eos_token_ids:
                return
            rule = dataclasses.replace(rule, survival=self._survival, n_drafted=n)
        if rule.value(rule.survival, 0) <= 0.0:
            return
        discarded = draft_by(exit_, draft, rule)
        self._scored = len(draft) - n
        if discarded is not None:
            self._scored += 1
            self.discard(draft, discarded)

    def discard(self, draft: Draft, candidate: Candidate) -> None:
        """Leave out a token of the early exit, and compare it with the model's own later."""
        (token,), (confidence,) = candidate.token_ids, candidate.confidences
        self._discarded, draft.discarded = (token, confidence), 1

    def update(self, draft: Draft, committed: Sequence[int], accepted: int) -> None:
        """See `Controller`."""
        self.learn(draft, committed, accepted)
        time = self.round_cost(draft)
        self._throughput.update(accepted + 1, time)
        sources = {*draft.sources}
        if self._scored and self._exit is not None:
            sources.add(self._exit.name)
        for source in sources:
            self._backoff[source].update(accepted + 1, time)

    def round_cost(self, draft: Draft) -> float:
        """Return the cost of the round that verified a draft, in plain steps."""
        looked_up = len(draft) - draft.sources.count(self._exit.name if self._exit else "")
        return self._costs.round(len(draft), self._scored, looked_up)

    def learn(self, draft: Draft, committed: Sequence[int], accepted: int) -> None:
        """Learn the acceptance of a verified draft."""
        # Tokens after the first rejected one were never verified.
        for i in range(min(accepted + 1, len(draft))):
            if self._exit is not None and draft.sources[i] == self._exit.name:
                self._acceptance.update(self._exit.name, draft.confidences[i], i < accepted)
                self._acceptance.exit_accepted += i < accepted
                self._acceptance.exit_verified += 1
        # Proposals of look-ups are compared with what was committed, whether they were drafted or not.
        for source, candidate in self._proposals:
            pairs = zip(candidate.token_ids, candidate.confidences, committed, strict=False)
            for token, confidence, own in pairs:
                self._acceptance.update(source, confidence, token == own)
                if token != own:
                    break
        # Without this, a confidence that is estimated too low would never be tried again. A sampled
        # token says little about whether another one would have been accepted.
        if self._discarded and self._exit and self._greedy and accepted == len(draft):
            token, confidence = self._discarded
            self._acceptance.update(self._exit.name, confidence, committed[accepted] == token)
            self._acceptance.exit_accepted += committed[accepted] == token
            self._acceptance.exit_verified += 1


class Verified(Protocol):
    """The committed tokens of a row's round (a `Step`)."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Accepted tokens and the model's own."""
        ...

    @property
    def accepted(self) -> int:
        """Number of drafted tokens among them."""
        ...


@dataclasses.dataclass
class RowDraft:
    """The draft of one row of a batch, and what decides its length.

    Attributes:
        draft: empty at first.
        controller: of the row; None for a row that drafts nothing.
        sampler: of the row.
        max_tokens: number of tokens to draft at most.
        shares_exit: whether the shared exit may draft.
        reader: the row's exit adapter, or None.
        survival: probability that all of the draft is accepted.
    """

    draft: Draft
    controller: Controller | None
    sampler: Sampler
    max_tokens: int
    shares_exit: bool
    reader: StateReader | None = None
    survival: float = 1.0


class BatchController:
    """Spends the positions of a round where they bring most: which rows draft, and how far.

    The renewal-reward rule of `DraftController` for several rows. R is what all rows yield in a unit of
    time, never less than in plain decoding, so that many rows draft little or nothing: each further
    position then costs more than it yields.
    """

    def __init__(self) -> None:
        self._throughput, self._backoff = Throughput(), Backoff()  # in rounds of plain decoding

    def fill(
        self,
        rows: Sequence[RowDraft],
        exit_: SharedExit | None,
        costs: "DraftCosts",
        prompt_positions: int,
    ) -> None:
        """Fill the drafts of a round.

        Args:
            rows: all that decode.
            exit_: the early exit that some of them share, or None.
            costs: of this decoder and exit over the rows' contexts.
            prompt_positions: number of positions of prompts in the pass.
        """
        n_rows = len(rows)
        self._positions = n_rows + prompt_positions
        # What prompts cost is no reason to draft: the tokens can also come in a later round.
        self._plain = self._time = costs.over(n_rows, n_rows)
        self._drafted_by_exit = False
        self._rate = self._throughput.rate * n_rows / self._plain
        self._draft_fixed(rows)
        self._draft_lookups(rows, costs)
        if exit_ is not None:
            self._draft_by_exit(rows, exit_, costs)
        before = n_rows + prompt_positions
        self._time += costs.rows(before, self._positions - before)

    def _draft_fixed(self, rows: Sequence[RowDraft]) -> None:
        """Draft the proposals of look-ups for rows that draft as much as they may."""
        for row in rows:
            if isinstance(row.controller, FixedController):
                row.controller.look_up(row.draft, row.max_tokens)
                self._positions += len(row.draft)

    def _draft_lookups(self, rows: Sequence[RowDraft], costs: "DraftCosts") -> None:
        """Draft the most valuable beginnings of all look-ups' proposals."""
        offers = list[tuple[RowDraft, str, Candidate, list[float]]]()
        for row in rows:
            if isinstance(row.controller, DraftController):
                offer = row.controller.look_up(row.draft, row.max_tokens)
                if offer is not None:
                    offers.append((row, *offer))
        # Survival falls along a proposal, so the most probable tokens of all are beginnings of each.
        ordered = sorted(((s, i) for i, offer in enumerate(offers) for s in offer[3]), reverse=True)
        tokens, best_value, best = 0.0, 0.0, 0
        for n, (survival, _) in enumerate(ordered, 1):
            tokens += survival
            value = tokens - self._rate * costs.rows(self._positions, n)
            if value > best_value:
                best_value, best = value, n
        counts = [0] * len(offers)
        for _, i in ordered[:best]:
            counts[i] += 1
        for (row, source, candidate, survivals), n in zip(offers, counts, strict=True):
            if n:
                row.draft.extend(candidate, n, source)
                row.survival = survivals[n - 1]
        self._positions += best

    def _draft_by_exit(
        self, rows: Sequence[RowDraft], exit_: SharedExit, costs: "DraftCosts"
    ) -> None:
        """Draft with the early exit for rows without a proposal, a token each in a pass."""
        rows = [row for row in rows if row.shares_exit and not len(row.draft)]
        fixed = [row for row in rows if isinstance(row.controller, FixedController)]
        if not (rows if self._backoff.next_round() else fixed):
            return
        overhead = costs.overhead
        while True:
            rows = [row for row in rows if len(row.draft) < row.max_tokens]
            chosen = [row for row in rows if isinstance(row.controller, FixedController)]
            chosen += self._worth_drafting(rows, costs, overhead)
            if not chosen:
                return
            candidates = exit_.propose(chosen)
            n = len(chosen)
            self._time += overhead + (costs.layers + costs.head) * costs.over(n, n)
            # The first layers have seen the position before.
            self._time -= costs.layers * costs.rows(self._positions, n)
            overhead, self._drafted_by_exit = 0.0, True
            kept = list[RowDraft]()
            threshold = self._rate * (1 - costs.layers) * costs.rows(self._positions, n) / n
            for row, candidate in zip(chosen, candidates, strict=True):
                if isinstance(row.controller, DraftController):
                    (confidence,) = candidate.confidences
                    row.survival *= row.controller.acceptance.of(exit_.name, confidence)
                    if row.survival < threshold:
                        row.controller.discard(row.draft, candidate)
                        continue
                row.draft.extend(candidate, 1, exit_.name)
                kept.append(row)
            self._positions += len(kept)
            rows = kept

    def _worth_drafting(
        self, rows: Sequence[RowDraft], costs: "DraftCosts", overhead: float
    ) -> list[RowDraft]:
        """Return the rows for which another token of the early exit pays, with those after it."""
        ranked = [
            (row.survival, row.controller.acceptance.exit_mean, row)
            for row in rows
            if isinstance(row.controller, DraftController)
        ]
        ranked.sort(key=lambda entry: -entry[0] * entry[1])
        tokens = [0.0] * LOOKAHEAD  # expected of the first n rows in 1, 2, ... passes
        best, best_value, before = 0, 0.0, costs.over(self._positions)
        for n, (survival, mean, row) in enumerate(ranked, 1):
            drafting, of_row = (costs.layers + costs.head) * costs.over(n, n), 0.0
            for i in range(min(LOOKAHEAD, row.max_tokens - len(row.draft))):
                survival *= mean
                of_row += survival
                tokens[i] += of_row
                verifying = costs.over(self._positions + (i + 1) * n) - before
                cost = overhead + (i + 1) * drafting + (1 - costs.layers) * verifying
                if (value := tokens[i] - self._rate * cost) > best_value:
                    best, best_value = n, value
        return [row for _, _, row in ranked[:best]]

    def update(self, verified: Sequence[tuple[RowDraft, Verified]]) -> None:
        """Learn the verification of a round."""
        n_rows = tokens = len(verified)
        for row, step in verified:
            tokens += step.accepted
            if isinstance(row.controller, DraftController):
                row.controller.learn(row.draft, step.tokens, step.accepted)
        self._throughput.update(tokens / n_rows, self._time / self._plain)
        if self._drafted_by_exit:
            self._backoff.update(tokens / n_rows, self._time / self._plain)


# --- costs

_GPU_ROW_COST = 0.01  # of one more position, as a share of a pass: an estimate
# Cost of one more position in attention over a long context, as a share of the first, where it was not
# timed: keys and values are loaded once for several positions, but each has arithmetic of its own.
_ATTENTION_ROW = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftCosts:
    """Costs in units of a plain step, measured by `layerskip tune` or else estimated from bytes read.

    Attributes:
        layers: the first E layers over one token; 0 without an early exit.
        head: the draft's head over one token.
        passes: all layers and the head over 1, 2, ... positions, without `attention`; beyond its end
            every further position adds the average of those in the second half.
        overhead: additional cost of a round that drafts by early exit; 0 where it was not measured.
        attention: over the contexts, for one position of each prompt.
        attention_row: share of it that one more position adds.
        prompts: number of prompts.
    """

    layers: float
    head: float
    passes: tuple[float, ...]
    overhead: float = 0.0
    attention: float = 0.0
    attention_row: float = _ATTENTION_ROW
    prompts: int = 1

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        exit_layer: int,
        head_share: float = 1.0,
        measured: StepCosts | None = None,
        contexts: Sequence[int] = (0,),
    ) -> "DraftCosts":
        """Return the costs of drafting with the first E layers and a share of the head's tokens.

        Without a measurement they are shares of the bytes read, and a pass over more positions than
        were measured costs what this machine was timed to take (on a GPU an estimate).

        Args:
            decoder: the model.
            exit_layer: E; 0 without an early exit.
            head_share: rows of the draft's head over the vocabulary size.
            measured: by `layerskip tune`.
            contexts: for each prompt, the number of positions that attention reads.
        """
        depth = exit_layer / len(decoder.layers)
        machine = _machine_costs(decoder)
        if measured is None:
            weight_bytes = decoder.weight_bytes
            layers = (weight_bytes - decoder.head.weight_bytes) / weight_bytes * depth
            head = head_share * decoder.head.weight_bytes / weight_bytes
            passes, overhead = machine.passes, 0.0
        else:
            scored = measured.draft_tokens_scored / decoder.architecture.vocab_size
            timed = max(measured.draft_step - measured.head * scored, 0.0)
            layers = timed * exit_layer / measured.exit_layer
            head = measured.head * head_share
            passes, overhead = _extrapolated(measured.passes, machine.passes), measured.overhead
        included = 0 if measured is None else measured.context
        share, row = _attention(decoder, contexts, included, None if measured else machine)
        rest = 1.0 - share
        return cls(
            layers=rest * layers + share * depth,
            head=rest * head,
            passes=tuple(rest * cost for cost in passes),
            overhead=rest * overhead,
            attention=share,
            attention_row=row,
            prompts=len(contexts),
        )

    def over(self, positions: int, prompts: int = 1) -> float:
        """Return the cost of a pass of all layers and the head over 1 or more positions."""
        further = positions / prompts - 1.0  # of each prompt
        attention = self.attention * prompts / self.prompts * (1.0 + further * self.attention_row)
        n_timed = len(self.passes)
        if positions <= n_timed:
            return self.passes[positions - 1] + attention
        middle = (n_timed - 1) // 2
        slope = (self.passes[-1] - self.passes[middle]) / max(n_timed - 1 - middle, 1)
        return self.passes[-1] + (positions - n_timed) * max(slope, 0.0) + attention

    def rows(self, positions: int, more: int) -> float:
        """Return what more positions add to a pass over so many."""
        return max(self.over(positions + more) - self.over(positions), 0.0)

    def of_tokens(self, n: int) -> list[float]:
        """Return the costs of the early exit's tokens 1 to n, their verification included."""
        if len(self._token_costs) < n:
            passes = [self.over(i) for i in range(1, n + 2)]
            more = (max(after - before, 0.0) for before, after in itertools.pairwise(passes))
            self._token_costs[:] = [self.layers + self.head + (1 - self.layers) * m for m in more]
        return self._token_costs[:n]

    @functools.cached_property
    def _token_costs(self) -> list[float]:
        return []

    def round(self, drafted: int, scored: int, looked_up: int = 0) -> float:
        """Return the cost of a round.

        Args:
            drafted: number of drafted tokens.
            scored: number of tokens that the early exit proposed, kept or not.
            looked_up: number of drafted tokens that came from look-ups, which cost no pass of their
                own; the first layers run over them together with the token before.
        """
        if not scored:
            return self.over(drafted + 1)
        passes = drafted + 1 - looked_up + self.rows(1, looked_up)
        drafting = self.layers * passes + self.head * scored + self.overhead
        return drafting + (1 - self.layers) * self.over(drafted + 1)


class ContextCosts:
    """`DraftCosts` for growing contexts, recomputed when the longest has grown by a quarter.

    Args:
        decoder: the model.
        exit_layer: E; None without an early exit.
        head_share: see `DraftCosts.of`.
        measured: see `DraftCosts.of`.
    """

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int | None,
        head_share: float,
        measured: StepCosts | None,
    ) -> None:
        self._costs_of = functools.partial(
            DraftCosts.of, decoder, exit_layer or 0, head_share, measured
        )
        self._contexts: tuple[int, ...] = ()

    def at(self, *contexts: int) -> DraftCosts:
        """Return the costs over contexts of these lengths."""
        before = self._contexts
        grown = abs(max(contexts) - max(before, default=0))
        if len(before) != len(contexts) or 4 * grown >= max(before):
            self._contexts, self._costs = contexts, self._costs_of(contexts)
        return self._costs


def time_passes(decoder: Decoder, adapter: ExitAdapterWeights | None = None) -> None:
    """Time what drafts are weighed by, where this machine has not done so before."""
    _machine_costs(decoder)
    if adapter is not None:
        for token_by_token in (False, True):
            head_share(decoder, adapter, token_by_token=token_by_token)


def _attention(
    decoder: Decoder, contexts: Sequence[int], included: int, machine: PassCosts | None
) -> tuple[float, float]:
    """Return attention's share of a step over some contexts, and the share that one more row adds.

    By the machine's times, else by bytes; a context of `included` positions is counted elsewhere.
    """
    kv_bytes = sum(_kv_bytes(decoder, context) for context in contexts)
    more = max(kv_bytes - _kv_bytes(decoder, included), 0)
    times = machine and machine.attention
    if not times or not times[0]:
        return more / (kv_bytes + decoder.weight_bytes), _ATTENTION_ROW
    of_layers = 1.0 - decoder.head.weight_bytes / decoder.weight_bytes
    time = times[0] * of_layers * more / _kv_bytes(decoder, FAR)
    rows = len(times) - 1
    return time / (1.0 + time), min((times[-1] - times[0]) / (rows * times[0]), 1.0)


def _kv_bytes(decoder: Decoder, context: int) -> int:
    """Return the bytes of keys and values that one position reads."""
    a = decoder.architecture
    positions = sum(
        context if window is None else min(context, window) for window in a.sliding_windows
    )
    return 2 * a.n_kv_heads * a.head_dim * decoder.dtype.itemsize * positions


def _extrapolated(passes: tuple[float, ...], estimated: tuple[float, ...]) -> tuple[float, ...]:
    """Return passes, continued by the estimated ones in proportion."""
    if len(estimated) <= len(passes):
        return passes
    factor = passes[-1] / estimated[len(passes) - 1]
    return passes + tuple(factor * cost for cost in estimated[len(passes) :])


def _machine_costs(decoder: Decoder) -> PassCosts:
    if decoder.device.type != "cpu":
        return PassCosts((1.0, 1.0 + _GPU_ROW_COST))
    return pass_costs(decoder)
