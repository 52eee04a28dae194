"""Self-speculative decoding as the paper describes it, in plain tensors: read this file first.

LayerSkip (arXiv 2404.16710), section 4.3: the first E layers and the model's own head draft d tokens,
one after the other; the remaining layers verify all of them in one pass; the longest prefix that the
model agrees with is kept, and the model's own token follows it.

Everything is recomputed from the first token in every step, and nothing is adaptive, so the code is as
short as the method. `generate.py` computes the same with one KV cache and with compiled kernels; the
tests compare it with these functions, token by token where decoding is greedy, and in distribution
where tokens are sampled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model import Decoder


def generate_plain(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Decode one token at a time with all layers.

    Returns:
        The new tokens, `max_new_tokens` of them.
    """
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = exit_logits(decoder, tokens, len(decoder.layers))[-1]
        tokens.append(choose(logits, temperature, generator))
    return tokens[len(prompt) :]


def generate_self_speculative(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    exit_layer: int,
    draft_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Decode by drafting with the first E layers and verifying with all of them.

    Greedy outputs equal those of `generate_plain`; sampled ones have the same distribution.

    Args:
        decoder: the model.
        prompt: token ids.
        max_new_tokens: number of new tokens.
        exit_layer: E, the number of layers that draft.
        draft_tokens: d, the number of tokens drafted in a round.
        temperature: 0 for greedy decoding.
        generator: source of randomness.

    Returns:
        The new tokens, `max_new_tokens` of them.
    """
    tokens = list(prompt)
    end = len(prompt) + max_new_tokens
    while len(tokens) < end:
        # 1. Draft: d tokens from the early exit, each of which sees those before it.
        draft: list[int] = []
        draft_logits: list[Tensor] = []
        for _ in range(min(draft_tokens, end - len(tokens) - 1)):
            logits = exit_logits(decoder, tokens + draft, exit_layer)[-1]
            draft.append(choose(logits, temperature, generator))
            draft_logits.append(logits)

        # 2. Verify: one pass of all layers gives the model's logits at the d + 1 positions.
        target_logits = exit_logits(decoder, tokens + draft, len(decoder.layers))
        target_logits = target_logits[len(tokens) - 1 :]

        # 3. Accept the longest prefix that agrees, and add the model's own token.
        accepted, following = accept(draft, draft_logits, target_logits, temperature, generator)

        # 4. Roll back: what was not accepted is forgotten.
        tokens += [*draft[:accepted], following]
    return tokens[len(prompt) :]


def exit_logits(decoder: Decoder, tokens: Sequence[int], exit_layer: int) -> Tensor:
    """Return the logits of an early exit at every position: layers [0, E), final norm, head. [T, V]."""
    ids = torch.tensor([list(tokens)], device=decoder.device)
    cache = decoder.new_cache(len(tokens))  # a fresh one: nothing is reused
    hidden = decoder.run(decoder.embed(ids), 0, exit_layer, cache)
    return decoder.logits(hidden)[0].float()


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """Return the most likely token of logits [V], or sample one."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def accept(
    draft: Sequence[int],
    draft_logits: Sequence[Tensor],
    target_logits: Tensor,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[int, int]:
    """Return how many drafted tokens are accepted, and the token that follows them.

    Args:
        draft: d token ids.
        draft_logits: d tensors [V], those that each token was chosen from.
        target_logits: [d + 1, V], those of the model at the same positions and after the last.
        temperature: of both.
        generator: source of randomness.
    """
    for i, token in enumerate(draft):
        if temperature == 0.0:
            # Greedy: accept while the most likely token is the same.
            if token != int(target_logits[i].argmax()):
                return i, int(target_logits[i].argmax())
            continue
        # Sampled: accept with probability min(1, p / q) (Leviathan et al., 2023) ...
        p = (target_logits[i] / temperature).softmax(dim=-1)
        q = (draft_logits[i] / temperature).softmax(dim=-1)
        if torch.rand((), generator=generator) >= p[token] / q[token]:
            # ... and after a rejection sample from max(p - q, 0), normalized.
            residual = (p - q).clamp(min=0.0)
            return i, int(torch.multinomial(residual, 1, generator=generator))
    return len(draft), choose(target_logits[len(draft)], temperature, generator)
