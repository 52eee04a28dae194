"""`DraftRule`: when a draft that is made token by token ends."""

import dataclasses
from collections.abc import Collection, Sequence

CONFIDENCE_BINS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftRule:
    """Ends a draft of an early exit by the renewal-reward rule.

    With R the tokens that a unit of time yields, another token has the value of the accepted tokens
    expected of it, and of those that may follow, minus R times their cost. Looking ahead matters where
    the cost grows in steps: a second position may be expensive, the third and fourth nearly free. The
    compiled kernels have the same rule (`Rule` of `kernels.cpp`).

    Attributes:
        rate: R.
        mean: mean acceptance of the exit's tokens.
        acceptance: probability that a token is accepted if all before it are, by its confidence in bins
            of equal width.
        costs: of token 1, 2, ... of the draft with its verification, in plain steps.
        head: the part of a token's cost that is spent before the token is known.
        overhead: additional cost of the first token.
        lookahead: number of further tokens that are considered.
        survival: probability that all that has been drafted before is accepted.
        n_drafted: number of tokens drafted before; the rule counts on from there.
        ends: tokens after which nothing is drafted.
    """

    rate: float
    mean: float
    acceptance: Sequence[float]
    costs: Sequence[float]
    head: float
    overhead: float
    lookahead: int
    survival: float = 1.0
    n_drafted: int = 0
    ends: Collection[int] = ()

    @property
    def limit(self) -> int:
        """Number of tokens that may be drafted at most."""
        return len(self.costs) - self.n_drafted

    def has_ended(self, survival: float, token_ids: Sequence[int]) -> bool:
        """Return True where no further token is proposed after these, which the rule has kept."""
        n = len(token_ids)
        if n == self.limit or (n and token_ids[-1] in self.ends):
            return True
        return self.value(survival, n) <= 0.0

    def value(self, survival: float, n: int) -> float:
        """Return the value of another token after n, before it is known."""
        paid = self.head if n else self.head + self.overhead
        return self._value_of(survival * self.mean, n) - self.rate * paid

    def keeps(self, survival: float, n: int) -> bool:
        """Return True where a token after n is kept; the survival includes its own acceptance."""
        return self._value_of(survival, n) >= 0.0

    def _value_of(self, survival: float, n: int) -> float:
        """Return the value of a token whose head is paid for, with those that may follow."""
        cost = self.costs[self.n_drafted + n] - self.head
        return survival - self.rate * cost + self.future(survival, n + 1)

    def future(self, survival: float, n: int) -> float:
        """Return the value of the tokens that may follow n, each with the mean acceptance."""
        value = best = 0.0
        begin = self.n_drafted + n
        for cost in self.costs[begin : begin + self.lookahead]:
            survival *= self.mean
            value += survival - self.rate * cost
            best = max(best, value)
        return best

    def survival_after(self, survival: float, confidence: float) -> float:
        """Return the survival with one more token of this confidence."""
        return survival * self.acceptance[bin_of(confidence, len(self.acceptance))]


def bin_of(confidence: float, n_bins: int) -> int:
    """Return the bin of a confidence from 0 to 1."""
    if not confidence > 0:  # or NaN
        return 0
    return min(int(confidence * n_bins), n_bins - 1)
