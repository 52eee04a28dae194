"""What every exit has to go on: one pass over known tokens, read between the layers."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder


@torch.inference_mode()
def iter_exit_hidden_states(
    decoder: Decoder, tokens: Tensor, exits: Collection[int], capacity: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Run all tokens through the layers once and look at the hidden states at some exits.

    `decoder.logits(hidden)` is what early exit there says at each position: row t predicts token t + 1.
    Apply it to parts of long texts; logits of all positions at once are large.

    Args:
        decoder: the model.
        tokens: [B, T]. Rows may be padded on the right: no position sees those after it.
        exits: layers run, each 0 (the embedding) to L.
        capacity: of the cache, T or more, which some rotary embeddings go by; None = T.

    Yields:
        The first position, the exit, and the hidden states [B, t, D] of t positions there, before the
        final norm; for each piece of the positions all exits in ascending order.

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
