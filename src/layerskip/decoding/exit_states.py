"""What every exit has to go on: one pass over known tokens, read between the layers."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder


@torch.inference_mode()
def exit_states(
    decoder: Decoder,
    token_ids: Sequence[int],
    exits: Collection[int],
    capacity: int | None = None,
) -> dict[int, Tensor]:
    """Run all tokens through the layers once and keep the hidden states at some exits.

    `decoder.logits(states[E])` is what early exit at E says at each position: row t predicts token
    t + 1. Apply it to parts of long texts; logits of all positions at once are large.

    Args:
        decoder: the model.
        token_ids: T tokens, at most the context.
        exits: layers run, each 0 (the embedding) to L.
        capacity: of the cache, T or more, which some rotary embeddings go by; None = T.

    Returns:
        Exit -> [1, T, D], before the final norm, in ascending order of exits.
    """
    parts: dict[int, list[Tensor]] = {e: [] for e in sorted(set(exits))}
    tokens = torch.tensor([list(token_ids)], device=decoder.device)
    for _, e, hidden in walk_exits(decoder, tokens, exits, capacity):
        parts[e].append(hidden)
    return {e: torch.cat(states, dim=1) for e, states in parts.items()}


@torch.inference_mode()
def walk_exits(
    decoder: Decoder, tokens: Tensor, exits: Collection[int], capacity: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """`exit_states` piece by piece, for who cannot keep them all.

    Args:
        decoder: the model.
        tokens: [B, T]. Rows may be padded on the right: no position sees those after it.
        exits: layers run, each 0 (the embedding) to L.
        capacity: see `exit_states`.

    Yields:
        The first position, the exit, and the hidden states [B, t, D] of t positions there; for each
        piece of the positions all exits in ascending order.

    Raises:
        ValueError: an id that is no token.
    """
    b, t = tokens.shape
    size = decoder.architecture.vocab_size
    if t and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"a token id is outside the vocabulary (0 to {size - 1})")
    cache = decoder.new_cache(max(t, capacity or t), b)
    wanted = sorted(set(exits))
    for first in range(0, t, PREFILL_CHUNK):
        chunk = tokens[:, first : first + PREFILL_CHUNK]
        hidden, start = decoder.embed(chunk), 0
        for e in wanted:
            hidden, start = decoder.run(hidden, start, e, cache), e
            yield first, e, hidden
        cache.lengths += chunk.shape[1]
