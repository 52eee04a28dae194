"""What rounds bring for their time, and when a source of drafts is left alone for a while."""

_PLAIN_ROUNDS = 4.0  # that an answer is thought to have begun with
_MEMORY = 0.95  # of tokens and times, a round
_CREDIT = 8.0  # tokens that a source of drafts may lose again of what it once gained
_FIRST_REST, _LONGEST_REST = 4, 32


class Pace:
    """Tokens and time of rounds, the newer ones weighing more; it begins as some plain ones."""

    def __init__(self, plain_rounds: float = _PLAIN_ROUNDS) -> None:
        self._tokens = self._time = self._rounds = plain_rounds

    @property
    def rate(self) -> float:
        """Tokens a unit of time. Plain decoding is always there: at least one."""
        return max(1.0, self._tokens / self._time)

    def gain(self, rate: float) -> float:
        """What a round brings beyond its time at this rate, in tokens; 0 where there was none."""
        return (self._tokens - rate * self._time) / self._rounds if self._rounds else 0.0

    def learn(self, tokens: int, time: float) -> None:
        """Take note of a round."""
        self._tokens = _MEMORY * self._tokens + tokens
        self._time = _MEMORY * self._time + time
        self._rounds = _MEMORY * self._rounds + 1


class Rests:
    """Rounds in which a source of drafts is not asked, longer each time that asking did not pay.

    Args:
        trust: tokens that it may lose before it is first left alone.
    """

    def __init__(self, trust: float = 0.0) -> None:
        self._rest, self._left = _FIRST_REST, 0
        self._gained = trust  # tokens beyond its rounds' time, the newer ones weighing more

    def begins(self) -> bool:
        """Whether it is asked this time."""
        if self._left:
            self._left -= 1
            return False
        return True

    @property
    def resting(self) -> bool:
        """Whether it will not be asked."""
        return self._left > 0

    def learn(self, tokens: int, time: float) -> None:
        """Take note of a round. All pay while they are no slower than plain decoding.

        Old gains are soon forgotten.
        """
        self._gained = min(_MEMORY * self._gained + tokens - time, _CREDIT)
        self.judge(self._gained >= 0)

    def judge(self, paid: bool) -> None:
        """Take note of whether asking has paid lately."""
        if paid:
            self._rest = _FIRST_REST
        else:
            self._left = self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
