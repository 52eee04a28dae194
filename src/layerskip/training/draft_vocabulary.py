"""Which tokens a trained model's early exit should draft: those that its answers are made of."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layerskip.model.draft_vocabulary import worth_drafting
from layerskip.model.files.draft_text import sampled
from layerskip.recipe.exit_loss import IGNORED_LABEL


def draft_vocabulary(
    rows: Iterable[Mapping[str, Sequence[int]]], model: Any, end_token: int | None
) -> tuple[int, ...] | None:
    """Count the labels and keep the tokens that are worth their row of the head.

    Args:
        rows: encoded rows, with `labels`.
        model: a transformers model, for the size of its vocabulary and weights.
        end_token: kept in any case, where there is one.

    Returns:
        Token ids, the most frequent first; None where a list would save too little.
    """
    counts = Counter(label for row in rows for label in row["labels"])
    counts.pop(IGNORED_LABEL, None)
    config = model.config.get_text_config()
    weights = sum(weight.numel() for weight in model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the embedding is looked up, not read
    return worth_drafting(
        counts,
        row_share=config.hidden_size / max(weights, 1),
        vocab_size=config.vocab_size,
        always=() if end_token is None else (end_token,),
    )


def labels_of(rows: Any) -> list[list[int]]:
    """What the rows teach to say that a draft text is made from.

    Args:
        rows: encoded rows, with `labels`: a list or a data set, of which no other row is read.
    """
    chosen = (rows[i]["labels"] for i in sampled(len(rows)))
    return [[label for label in labels if label != IGNORED_LABEL] for labels in chosen]
