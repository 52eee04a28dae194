"""Which text is worth searching for n-grams beside prompt and answer: one that says what answers repeat.

It travels with a checkpoint as `draft_vocabulary` does.
"""

import heapq
from collections import Counter
from collections.abc import Sequence

MOST = 8_192  # tokens; beyond that the text itself becomes a burden to the checkpoint
MOST_OF_TRAINING = 4_096
_RUN = 4  # tokens that count as a repetition
_MOST_ROWS = 4_000  # that are looked at
_LEAST = 2.5e-4  # of the rows: what a run has to be repeated in, on average


def sampled(n: int) -> range:
    """Which of n rows are looked at: all, or some thousand of them at even distances."""
    return range(0, n, max(1, -(-n // _MOST_ROWS)))


def most_repeated(
    rows: Sequence[Sequence[int]], at_most: int = MOST_OF_TRAINING
) -> tuple[int, ...]:
    """Rows that have most of what others repeat, for their length, one after the other.

    Greedy maximum coverage: each row counts for its runs of tokens that no row before it has, as often
    as other rows have them.

    Args:
        rows: token ids of answers, each with its end token.
        at_most: tokens.

    Returns:
        Tokens; () where rows have too little in common.
    """
    looked_at = [rows[i] for i in sampled(len(rows))]
    runs = [{*zip(*(row[i:] for i in range(_RUN)), strict=False)} for row in looked_at]
    counts = Counter(run for of_row in runs for run in of_row)
    covered = set[tuple[int, ...]]()

    def worth(index: int) -> float:
        new = sum(counts[run] - 1 for run in runs[index] if run not in covered)
        return new / max(len(looked_at[index]), 1)

    text: list[int] = []
    heap = [(-worth(index), index) for index in range(len(looked_at))]
    heapq.heapify(heap)
    while heap and -heap[0][0] >= _LEAST * len(looked_at):
        _, index = heapq.heappop(heap)
        now = worth(index)  # what was chosen since may have taken some of it
        if heap and now < -heap[0][0]:
            heapq.heappush(heap, (-now, index))
        elif now >= _LEAST * len(looked_at) and len(text) + len(looked_at[index]) <= at_most:
            text += looked_at[index]
            covered |= runs[index]
    return tuple(text)
