"""How far to draft: a token is worth drafting where it brings more than its time could bring elsewhere.

A round that drafted n tokens costs `draft(n) + verify(n + 1)` and yields the accepted ones and one more.
Rounds follow one another, so the best rule is that of renewal-reward: with R the tokens that a unit of
time brings on average, draft one more while its probability of being accepted is at least R times what
it costs. R and the probabilities are learned as the answer goes on, from tokens and known costs alone.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Sequence

from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.pace import Pace, Rests

_BINS = 10
# Tokens that the first guesses weigh as much as.
_PRIOR = 4.0
# How often what followed a match of 0, 1, 2, ... tokens follows again, before anything is learned.
_NGRAM_BELIEFS = (0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_NGRAM_PRIOR = 2.0
_SHARE_POWER = 1.5  # what came next in six of ten times comes next in another text in some five
# How often a draft of an early exit that was ever right is right, before anything else is learned.
BELIEF, _BELIEF_WEIGHT = 0.8, 2.0
_MEMORY = 0.95  # of a batch's drafts, a round
_SURE = 0.8  # that all tokens of a draft are right: so sure, a trained exit needs no proof
# Tokens that a trained exit may lose before it rests: one that was unsure at the first position has not
# failed, and in a short answer it would hardly be asked again.
_TRUST = 0.35
_AHEAD = 8  # tokens, of which one that does not pay alone may be the first


class DraftLength:
    """Decides token by token how far an early exit drafts, and learns from every round.

    Args:
        costs: in units of a plain step; others may take their place as the context grows.
        pace: of all rounds of this answer; who owns it tells it of those without an early exit.
        trained: whether the exit was trained to draft. Others draft one token until one was right.
    """

    def __init__(self, costs: DraftCosts, pace: Pace | None = None, trained: bool = False) -> None:
        self.costs, self._pace = costs, pace or Pace()
        # Accepted and judged drafts by the draft's confidence; at first the confidence is believed.
        self._accepted = [_PRIOR * (i + 0.5) / _BINS for i in range(_BINS)]
        self._judged = [_PRIOR] * _BINS
        # The same over all drafts, whatever their confidence.
        self._right, self._seen = BELIEF * _BELIEF_WEIGHT, _BELIEF_WEIGHT
        self._proven, self._trained = False, trained  # whether a token was ever right
        self._rests = Rests(_TRUST if trained else 0.0)
        # What is compared with n-grams: rounds that were drafted here, and no others.
        self._drafting = Pace(plain_rounds=0.0)
        self._most = 0
        self._begin()

    def _begin(self) -> None:
        # Of the tokens kept; None of those that a text has between the exit's.
        self._confidences: list[float | None] = []
        self._scored = self._between = self._followed = 0
        self._survival = 1.0
        self._refused: float | None = None

    @property
    def drafted(self) -> int:
        """Tokens kept in this round."""
        return len(self._confidences)

    def begins(self, most: int = _AHEAD) -> bool:
        """Whether this round drafts at all, `most` tokens: not for a while after it has not paid."""
        self._begin()
        self._most = most
        return self._rests.begins()

    @property
    def proven(self) -> bool:
        """Whether one of its drafts was ever right."""
        return self._proven

    @property
    def rests(self) -> bool:
        """Whether the next round is not going to be drafted here."""
        return self._rests.resting

    @property
    def gain(self) -> float:
        """What a round brings beyond its time's worth, by experience; none while it rests."""
        return float("-inf") if self.rests else self._drafting.gain(self._pace.rate)

    def keeps(self, confidence: float) -> bool:
        """Whether a token of a draft whose highest probability is this is worth its cost.

        Alone, or with those that are drafted after it: two rows may be dear where four are not.
        """
        self._scored += 1
        bin_ = _bin(confidence)
        survival = self._survival * self._accepted[bin_] / self._judged[bin_]
        gain = survival - self._pace.rate * self.costs.token(self.drafted)
        if gain < 0 and self._goes_on(survival):
            gain += self._drafting_on(survival, 1)
        if gain < 0:
            self._refused = confidence
            return False
        self._survival = survival
        self._confidences.append(confidence)
        return True

    @property
    def ends(self) -> bool:
        """Whether the draft ends here, before another token is scored."""
        if not self._confidences:
            return False
        return not (self._goes_on(self._survival) and self._drafting_on(self._survival))

    def _goes_on(self, survival: float) -> bool:
        return self._proven or (self._trained and survival >= _SURE)

    def instead(self, chances: Sequence[float]) -> int:
        """How many tokens of a text stand in place of the exit's next ones: those are dearer.

        The exit is thought to be right as often as it was. A wrong token takes all behind it along.

        Args:
            chances: of each to be accepted if all before it are.
        """
        if not self._proven:
            return 0
        rate, exits = self._pace.rate, self._right / self._seen
        saved, taken = rate * (self.costs.layers + self.costs.head), 0
        for chance in chances:
            survival = self._survival * chance
            room = min(self._most - self.drafted, _AHEAD)
            at_stake = (1.0 - exits**room) / (1.0 - exits)  # this token, and those that may follow
            if (self._survival * exits - survival) * at_stake > saved:
                break
            if survival < rate * self.costs.rows(self.drafted + 1, 1) or self.drafted >= self._most:
                break
            self._survival = survival
            self._confidences.append(None)
            taken += 1
        self._between += taken
        return taken

    def follow(self, chances: Sequence[float]) -> int:
        """How many further tokens stand behind this draft, in place of drafting on; 0 = draft on.

        They cost no pass of the first layers: the last drafted token has to go through them anyway.

        Args:
            chances: of each to be accepted if all before it are.
        """
        if not self._proven:
            return 0
        rate, drafted, survival, tokens = self._pace.rate, self.drafted, self._survival, 0.0
        best, self._followed = self._drafting_on(survival), 0
        for n, chance in enumerate(chances, 1):
            survival *= chance
            tokens += survival
            gain = tokens - rate * self.costs.rows(drafted + 1, n)
            if gain > best:
                best, self._followed = gain, n
        return self._followed

    def _drafting_on(self, survival: float, asked: int = 0) -> float:
        """What more tokens behind this draft and those asked about bring beyond their time's worth.

        They are thought to be right as often as others were; no more are looked at than may be drafted.
        """
        share, rate, gain, best = self._right / self._seen, self._pace.rate, 0.0, 0.0
        first = self.drafted + asked
        for n in range(first, min(first + _AHEAD, self._most)):
            survival *= share
            gain += survival - rate * self.costs.token(n)
            best = max(best, gain)
        return best

    def learn(self, accepted: int, refused_was_right: bool | None = None) -> None:
        """Take note of a round whose first `accepted` tokens were accepted.

        Args:
            accepted: of those that were kept, and of what followed them.
            refused_was_right: whether the token that was not kept would have been accepted, where the
                round shows it; else a confidence that is thought too low would never be tried again.
        """
        if self._refused is not None and refused_was_right is not None:
            self._judge(self._refused, refused_was_right)
        if not (self._scored or self._between):
            self._pace.learn(1, 1.0)
            return
        judged = self._confidences[: accepted + 1]  # what comes after a miss was never judged
        for i, confidence in enumerate(judged):
            if confidence is None:
                continue
            self._judge(confidence, i < accepted)
            self._right += i < accepted
            self._seen += 1
        time = self.costs.round(self.drafted, self._scored, self._between)
        time += self.costs.rows(self.drafted + 1, self._followed)
        for account in (self._pace, self._rests, self._drafting):
            account.learn(accepted + 1, time)

    def _judge(self, confidence: float, was_right: bool) -> None:
        self._judged[_bin(confidence)] += 1
        self._accepted[_bin(confidence)] += was_right
        self._proven = self._proven or was_right


class BatchLength:
    """Decides how many tokens are drafted for each row of a batch, from how often they were right.

    Where nothing is worth it one token is tried now and then, after longer and longer rests.

    Args:
        costs: in units of a plain step; others may take their place as contexts grow.
        most: tokens of a draft.
    """

    def __init__(self, costs: DraftCosts, most: int) -> None:
        self.costs, self._most, self._rests = costs, most, Rests()
        self._right, self._seen = BELIEF * _BELIEF_WEIGHT, _BELIEF_WEIGHT

    def choose(self, rows: int) -> int:
        """The length of this round's drafts, for so many rows."""
        if not self._rests.begins():
            return 0
        best = self.costs.batch_draft_tokens(rows, self._most, self._right / self._seen)
        self._rests.judge(best > 0)
        return best or min(1, self._most)

    def learn(self, drafted: int, accepted: Sequence[int]) -> None:
        """Take note of a round: what comes after a row's first miss was never judged."""
        self._right = _MEMORY * self._right + sum(accepted)
        # A little doubt is always left: no acceptance is 1.
        self._seen = _MEMORY * self._seen + sum(min(n + 1, drafted) for n in accepted) + 1e-3


def by_match(match: int, n: int) -> list[int]:
    """What speaks for each of n tokens that followed a match: how long it is, one longer for each."""
    return [min(match + i, len(_NGRAM_BELIEFS) - 1) for i in range(n)]


def by_share(shares: Iterable[float]) -> list[int]:
    """What speaks for tokens of a draft text: how often just they came next there, of all times."""
    return [len(_NGRAM_BELIEFS) + _bin(share) for share in shares]


class NgramLength:
    """Decides how many of an n-gram's tokens are drafted, from what speaks for each.

    Evidence is a list with a number for each token, of `by_match` or `by_share`; how often tokens with
    the same number were right is learned. Every further token counts only if all before it were right.

    Args:
        costs: in units of a plain step; drafting is free, only verification costs. Others may take
            their place as the context grows.
        pace: of all rounds of this answer, shared with the early exit's `DraftLength`.
    """

    def __init__(self, costs: DraftCosts, pace: Pace) -> None:
        self.costs, self._pace = costs, pace
        of_shares = (((i + 0.5) / _BINS) ** _SHARE_POWER for i in range(_BINS))
        beliefs = (*_NGRAM_BELIEFS, *of_shares)
        self._accepted = [_NGRAM_PRIOR * belief for belief in beliefs]
        self._judged = [_NGRAM_PRIOR] * len(beliefs)
        self._rests = Rests()
        self._evidence: Sequence[int] = ()
        self._drafted = 0
        # Where in an early exit's draft tokens stand that were proposed here, and what speaks for them.
        self._behind: list[tuple[int, Sequence[int]]] = []

    def expected(self, evidence: Sequence[int]) -> float:
        """How many of the tokens are right, on average."""
        return math.fsum(itertools.accumulate(self._chances(evidence), operator.mul))

    def choose(self, evidence: Sequence[int], rival: float = 0.0) -> int:
        """How many tokens to draft; 0 = leave this round to others.

        Args:
            evidence: for each token proposed.
            rival: what another way of this round brings beyond its time's worth, in tokens.
        """
        self._evidence, self._drafted, self._behind = evidence, 0, []
        if not evidence:
            return 0
        rate, survival, tokens = self._pace.rate, 1.0, 1.0
        best = max(rival, 1.0 - rate)
        for n, chance in enumerate(self._chances(evidence), 1):
            survival *= chance
            tokens += survival
            gain = tokens - rate * self.costs.over(n + 1)
            if gain > best:
                best, self._drafted = gain, n
        if self._drafted and not self._rests.begins():
            self._drafted = 0
        return self._drafted

    def judge(self, right: int, settled: int) -> None:
        """Take note of how many of the proposed tokens came next, drafted or not, of those that did."""
        self._judge(self._evidence[:settled], right)

    def learn(self, accepted: int) -> None:
        """Take note of a round that was drafted here, or of a plain step where nothing was."""
        if not self._drafted:
            self._pace.learn(1, 1.0)
            return
        time = self.costs.over(self._drafted + 1)
        self._pace.learn(accepted + 1, time)
        self._rests.learn(accepted + 1, time)

    def follow(self, evidence: Sequence[int], draft: DraftLength) -> int:
        """How many tokens stand behind an early exit's draft, whose last ones match; 0 = none."""
        n = draft.follow(self._chances(evidence))
        self._behind.append((draft.drafted, evidence[:n]))
        return n

    def instead(self, evidence: Sequence[int], draft: DraftLength) -> int:
        """How many tokens stand between an early exit's tokens; 0 = none."""
        begin, n = draft.drafted, draft.instead(self._chances(evidence))
        self._behind.append((begin, evidence[:n]))
        return n

    def learn_behind(self, accepted: int) -> None:
        """Take note of how much of an early exit's draft was accepted, with what stands behind it."""
        for begin, evidence in self._behind:
            # What was proposed for the first place is judged by whether it came next.
            if accepted >= begin and (begin or not self._evidence):
                self._judge(evidence, accepted - begin)
        self._behind = []

    def _judge(self, evidence: Sequence[int], accepted: int) -> None:
        # What comes after a miss was never judged.
        for i, at in enumerate(evidence[: accepted + 1]):
            self._judged[at] += 1
            self._accepted[at] += i < accepted

    def _chances(self, evidence: Sequence[int]) -> list[float]:
        return [self._accepted[at] / self._judged[at] for at in evidence]


def _bin(confidence: float) -> int:
    if not confidence > 0:  # nor is it, where logits are no numbers
        return 0
    return min(int(confidence * _BINS), _BINS - 1)
