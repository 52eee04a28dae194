"""How likely a model finds known tokens, at several exits, from one pass over them."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.decoding import walk_exits
from layerskip.decoding.prefix import turn_alike
from layerskip.model import Decoder

Progress = Callable[[str, int, int], None]  # what is done, how many of how many
HEAD_CHUNK = 256  # positions a product with the head: bounds the memory of logits


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens, of which the last `scored` are to be predicted, each from all those before it."""

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        assert 0 <= self.scored < max(len(self.tokens), 1), "the first token follows nothing"


@dataclasses.dataclass(frozen=True)
class Score:
    """What one exit makes of a passage.

    Attributes:
        log_likelihood: sum over the scored tokens, in nats.
        hits: how many of them the exit finds most likely of all tokens.
    """

    log_likelihood: float = 0.0
    hits: int = 0


@torch.inference_mode()
def score_passages(
    decoder: Decoder,
    passages: Sequence[Passage],
    exits: Collection[int],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int, Score]]:
    """Score passages at all exits, in batches of similar length.

    Passages that differ in their last token only, such as the letters of a multiple-choice question,
    are one row of a batch.

    Args:
        decoder: the model.
        passages: at most one token longer than the context.
        exits: layers run, each 1 to L.
        batch_size: rows a batch.
        progress: called with the passages done and their number after every batch.

    Returns:
        For every passage: exit -> score.
    """
    scores = [{e: Score() for e in exits} for _ in passages]
    same_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, passage in enumerate(passages):
        if passage.scored:
            same_input[passage.tokens[:-1]].append(i)
    # The largest first: what fits is known at once.
    rows = sorted(same_input, key=len, reverse=True)
    done = len(passages) - sum(map(len, same_input.values()))
    for batch in _batches(decoder, rows, batch_size):
        members = [same_input[row] for row in batch]
        found = _score_batch(
            decoder, batch, [[passages[i] for i in some] for some in members], exits
        )
        for i, score in zip((i for some in members for i in some), found, strict=True):
            scores[i] = score
            done += 1
        if progress is not None:
            progress(done, len(passages))
    return scores


def _batches(
    decoder: Decoder, rows: Sequence[tuple[int, ...]], batch_size: int
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Rows that run together: at most so many, and turned as each would be alone.

    They share a cache as wide as the longest, and a rotary embedding may depend on that (LongRoPE).
    """
    first = 0
    for end in range(1, len(rows) + 1):
        sizes = [len(row) for row in rows[first : end + 1]]
        if len(sizes) > batch_size or end == len(rows) or not turn_alike(decoder, *sizes):
            yield rows[first:end]
            first = end


def _score_batch(
    decoder: Decoder,
    inputs: Sequence[tuple[int, ...]],
    members: Sequence[Sequence[Passage]],
    exits: Collection[int],
) -> list[dict[int, Score]]:
    """Scores of all members in order; `members[b]` are the passages that share the row inputs[b]."""
    width = max(map(len, inputs))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs])
    wanted = [  # row, position, the token that follows there, whose it is
        (b, len(inputs[b]) - passage.scored + i, token)
        for b, some in enumerate(members)
        for passage in some
        for i, token in enumerate(passage.tokens[len(passage.tokens) - passage.scored :])
    ]
    sizes = torch.tensor([passage.scored for some in members for passage in some])
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    row, position, target = (column.to(decoder.device) for column in torch.tensor(wanted).T)
    nats = {e: torch.zeros(len(wanted)) for e in exits}
    hits = {e: torch.zeros(len(wanted), dtype=torch.bool) for e in exits}
    for start, e, hidden in walk_exits(decoder, tokens.to(decoder.device), exits):
        inside = (position >= start) & (position < start + hidden.shape[1])
        for some in inside.nonzero()[:, 0].split(HEAD_CHUNK):
            states = hidden[row[some], position[some] - start]
            nll, hit = _compare(decoder, states, target[some])
            nats[e][some.cpu()], hits[e][some.cpu()] = nll.cpu(), hit.cpu()

    def totals(per_token: Tensor) -> list[float]:
        sums = torch.zeros(len(sizes), dtype=torch.float64)
        return sums.index_add_(0, owner, per_token.double()).tolist()

    by_exit = {e: zip(totals(nats[e]), totals(hits[e]), strict=True) for e in exits}
    columns = {e: [Score(-nll, int(hit)) for nll, hit in pairs] for e, pairs in by_exit.items()}
    return [{e: columns[e][k] for e in exits} for k in range(len(sizes))]


def _compare(decoder: Decoder, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets [n] after states [n, D], and whether each is the best."""
    logits = decoder.logits(states[None])[0].float()
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target
