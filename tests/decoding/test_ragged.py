"""Draft, verification and acceptance work on batches whose rows are of different length."""

import pytest
import torch
from tiny_decoders import (
    FAMILIES,
    GREEDY,
    LAYERS,
    PLAIN,
    ids,
    random_prompt,
    tiny_decoder,
)

from layerskip.decoding.accept import accept_greedy
from layerskip.decoding.drafters import EarlyExitDrafter

LENGTHS = (1, 9, 4)
N_TOKENS = 24


def prefilled(decoder, prompts, capacity):
    """A cache with a row for each prompt, and the token after each, [B, 1]."""
    cache = decoder.new_cache(capacity, len(prompts))
    padded = torch.tensor([prompt + [0] * (max(LENGTHS) - len(prompt)) for prompt in prompts])
    hidden = decoder.run(decoder.embed(padded), 0, LAYERS, cache)
    cache.lengths += torch.tensor(LENGTHS)
    last = hidden[torch.arange(len(prompts)), cache.lengths - 1]
    return cache, decoder.logits(last[:, None]).argmax(-1)


@pytest.mark.parametrize("case", FAMILIES)
@torch.inference_mode()
def test_every_row_advances_by_its_own_accepted_tokens(case):
    decoder, exit_layer, d = tiny_decoder(case), 2, 4
    prompts = [random_prompt(decoder, n, seed=n) for n in LENGTHS]
    cache, last = prefilled(decoder, prompts, capacity=max(LENGTHS) + N_TOKENS * (d + 1))
    drafter = EarlyExitDrafter(decoder, exit_layer, GREEDY)
    answers, ragged = [[int(token)] for token in last], False
    while min(map(len, answers)) < N_TOKENS:
        settled = cache.lengths.clone()
        draft = drafter.draft(last, d, cache, None, None)
        cache.lengths.copy_(settled)
        hidden = decoder.run(draft.states, draft.start, LAYERS, cache)
        accepted, following = accept_greedy(draft.tokens, decoder.choose(hidden))
        cache.lengths += accepted + 1
        last = following[:, None]
        ragged |= len(set(accepted.tolist())) > 1
        for answer, row, n, own in zip(answers, draft.tokens, accepted, following, strict=True):
            answer += [*row[:n].tolist(), int(own)]
    assert ragged
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer[:N_TOKENS] == ids(decoder, prompt, PLAIN, N_TOKENS)
