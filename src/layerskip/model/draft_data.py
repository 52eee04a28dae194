"""Draft data that travels with a checkpoint: a draft vocabulary and datastore tokens, from texts.

On a small model the head costs as much as many layers, and most of its rows belong to tokens that the
answers hardly ever have (FR-Spec, arXiv 2502.14856). A datastore of the rows that others repeat most
lets n-grams draft what answers have in common.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

MAX_DRAFT_VOCABULARY = 16_384  # tokens; a longer list would be a burden to the checkpoint
_MAX_SHARE = 0.75  # of the vocabulary: a longer list saves too little


def worth_drafting(
    counts: Mapping[int, int],
    *,
    row_share: float,
    vocab_size: int,
    always: Iterable[int] = (),
) -> tuple[int, ...] | None:
    """Return the tokens whose share of the text is at least their row's share of a step's cost.

    A drafted token that is accepted saves about one step, and the row is read at every drafted token:
    so a row pays where its token comes up that often. Every token seen in a short text pays.

    Args:
        counts: token id -> its number of occurrences in text like the answers.
        row_share: one row of the head over all weights that a step reads.
        vocab_size: V.
        always: ids that are always kept, such as end tokens.

    Returns:
        Ids, the most frequent first; None where a list would save too little, or nothing was counted.
    """
    total = sum(counts.values())
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    worth = [token for token in frequent if counts[token] >= row_share * total]
    token_ids = tuple(dict.fromkeys([*always, *worth[:MAX_DRAFT_VOCABULARY]]))
    return token_ids if worth and len(token_ids) <= _MAX_SHARE * vocab_size else None


MAX_DATASTORE_TOKENS = 8_192  # a longer text would be a burden to the checkpoint
MAX_TRAINING_DATASTORE_TOKENS = 4_096
_NGRAM = 4  # tokens that count as a repetition
_MAX_ROWS = 4_000  # that are read
_MIN_REPETITION = 2.5e-4  # of the rows, that an n-gram has to be repeated in on average


def sampled_rows(n: int) -> range:
    """Return the indices of the rows to read of n: all, or some thousand at even distances."""
    return range(0, n, max(1, -(-n // _MAX_ROWS)))


def most_repeated(
    rows: Sequence[Sequence[int]], at_most: int = MAX_TRAINING_DATASTORE_TOKENS
) -> tuple[int, ...]:
    """Return the rows that hold most of what others repeat, for their length, concatenated.

    Greedy maximum coverage: a row counts for its n-grams that no row before it has, as often as other
    rows have them.

    Args:
        rows: token ids of answers, each with its end token.
        at_most: maximum number of tokens.

    Returns:
        Token ids; () where rows have too little in common.
    """
    read_rows = [rows[i] for i in sampled_rows(len(rows))]
    runs = [{*zip(*(row[i:] for i in range(_NGRAM)), strict=False)} for row in read_rows]
    counts = Counter(run for of_row in runs for run in of_row)
    covered = set[tuple[int, ...]]()

    def worth(index: int) -> float:
        new = sum(counts[run] - 1 for run in runs[index] if run not in covered)
        return new / max(len(read_rows[index]), 1)

    text: list[int] = []
    heap = [(-worth(index), index) for index in range(len(read_rows))]
    heapq.heapify(heap)
    while heap and -heap[0][0] >= _MIN_REPETITION * len(read_rows):
        _, index = heapq.heappop(heap)
        now = worth(index)  # rows chosen since may have covered some of it
        if heap and now < -heap[0][0]:
            heapq.heappush(heap, (-now, index))
        elif (
            now >= _MIN_REPETITION * len(read_rows) and len(text) + len(read_rows[index]) <= at_most
        ):
            text += read_rows[index]
            covered |= runs[index]
    return tuple(text)
