"""What every exit has to go on: one pass over known tokens, read between the layers."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder


@torch.inference_mode()
def exit_states(
    decoder: Decoder, token_ids: Sequence[int], exits: Collection[int]
) -> dict[int, Tensor]:
    """Run all tokens through the layers once and keep the hidden states at some exits.

    `decoder.logits(states[E])` is what early exit at E says at each position: row t predicts token
    t + 1. Apply it to parts of long texts; logits of all positions at once are large.

    Args:
        decoder: the model.
        token_ids: T tokens, at most the context.
        exits: layers run, each 0 (the embedding) to L.

    Returns:
        Exit -> [1, T, D], before the final norm, in ascending order of exits.
    """
    cache = decoder.new_cache(len(token_ids))
    wanted = sorted(set(exits))
    parts: dict[int, list[Tensor]] = {e: [] for e in wanted}
    for chunk in torch.tensor([list(token_ids)], device=decoder.device).split(PREFILL_CHUNK, dim=1):
        hidden, start = decoder.embed(chunk), 0
        for e in wanted:
            hidden, start = decoder.run(hidden, start, e, cache), e
            parts[e].append(hidden)
        cache.lengths += chunk.shape[1]
    return {e: torch.cat(states, dim=1) for e, states in parts.items()}
