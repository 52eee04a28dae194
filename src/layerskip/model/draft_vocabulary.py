"""Which tokens are worth a row of the draft's head.

On a small model the head costs as much as many layers, and most of its rows are of tokens that the
answers hardly ever have (FR-Spec, arXiv 2502.14856).
"""

from collections.abc import Iterable, Mapping

MOST = 16_384  # tokens; beyond that the list itself becomes a burden to the checkpoint
_GAIN_FROM = 0.75  # of the vocabulary: a longer list saves nothing worth having


def worth_drafting(
    counts: Mapping[int, int],
    *,
    row_share: float,
    vocab_size: int,
    always: Iterable[int] = (),
) -> tuple[int, ...] | None:
    """The tokens whose share of the text is at least the share of a step that their row costs.

    A drafted token that is accepted saves about one step, and the row is read at every drafted token:
    so a row pays where its token comes up that often. Every token seen in a short text pays.

    Args:
        counts: token id -> how often it stands in text like the answers.
        row_share: one row of the head over all weights that a step reads.
        vocab_size: V.
        always: ids that are kept in any case, such as end tokens.

    Returns:
        Ids, the most frequent first; None where a list would save too little, or nothing was counted.
    """
    total = sum(counts.values())
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    worth = [token for token in frequent if counts[token] >= row_share * total]
    kept = tuple(dict.fromkeys([*always, *worth[:MOST]]))
    return kept if worth and len(kept) <= _GAIN_FROM * vocab_size else None
