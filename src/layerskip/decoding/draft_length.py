"""How far to draft: a token is worth drafting where it brings more than its time could bring elsewhere.

A round that drafted n tokens costs `draft(n) + verify(n + 1)` and yields the accepted ones and one more.
Rounds follow one another, so the best rule is that of renewal-reward: with R the tokens that a unit of
time brings on average, draft one more while its probability of being accepted is at least R times what
it costs. R and the probabilities are learned as the answer goes on; nothing is timed here, so the same
prompt is always decoded in the same way.
"""

import dataclasses

from layerskip.model import Decoder
from layerskip.model.linear import Linear

# What one more row adds to a verification, in plain steps: weights are read once for all rows.
_ROW_COST = 0.03
_BINS = 10
# Rounds that the first guesses weigh as much as.
_PRIOR = 4.0
_MEMORY = 0.95  # of R, a round
_FIRST_REST, _LONGEST_REST = 4, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftCosts:
    """Costs in units of a plain step.

    Attributes:
        layers: the first E layers over one token.
        head: the draft's exit over one token.
        row: one more position in a verification.
    """

    layers: float
    head: float
    row: float = _ROW_COST

    @classmethod
    def of(cls, decoder: Decoder, exit_layer: int, head: Linear) -> "DraftCosts":
        """Costs of drafting with the first E layers and a head, as shares of the bytes read."""
        whole = decoder.weight_bytes
        layers = (whole - decoder.head.weight_bytes) / whole
        return cls(layers=layers * exit_layer / len(decoder.layers), head=head.weight_bytes / whole)

    def round(self, drafted: int, scored: int) -> float:
        """Cost of a round whose draft scored some tokens and kept `drafted` of them."""
        return 1 + drafted * (self.layers + self.row) + scored * self.head


class DraftLength:
    """Decides token by token, and learns from every round.

    Args:
        costs: in units of a plain step.
    """

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        # Accepted and judged drafts by the draft's confidence; at first the confidence is believed.
        self._accepted = [_PRIOR * (i + 0.5) / _BINS for i in range(_BINS)]
        self._judged = [_PRIOR] * _BINS
        self._tokens = self._time = _PRIOR  # as plain decoding: one token a step
        self._rest, self._resting = _FIRST_REST, 0
        self._begin()

    def _begin(self) -> None:
        self._confidences: list[float] = []
        self._scored = 0
        self._survival = 1.0

    def begins(self) -> bool:
        """Whether this round drafts at all: not for a while after drafting has not paid."""
        self._begin()
        if self._resting:
            self._resting -= 1
            return False
        return True

    def keeps(self, confidence: float) -> bool:
        """Whether a token that the draft gives this probability is worth its cost."""
        self._scored += 1
        bin_ = _bin(confidence)
        survival = self._survival * self._accepted[bin_] / self._judged[bin_]
        cost = self._costs.layers + self._costs.row + self._costs.head
        # Plain decoding is always there, with one token a unit of time.
        if survival < max(1.0, self._tokens / self._time) * cost:
            return False
        self._survival = survival
        self._confidences.append(confidence)
        return True

    def learn(self, accepted: int) -> None:
        """Take note of a round whose first `accepted` drafts were accepted."""
        if not self._scored:
            return
        judged = self._confidences[: accepted + 1]  # what comes after a miss was never judged
        for i, confidence in enumerate(judged):
            self._judged[_bin(confidence)] += 1
            self._accepted[_bin(confidence)] += i < accepted
        self._tokens = _MEMORY * self._tokens + accepted + 1
        self._time = _MEMORY * self._time + self._costs.round(len(self._confidences), self._scored)
        if self._tokens < self._time:
            self._resting = self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
        else:
            self._rest = _FIRST_REST


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
