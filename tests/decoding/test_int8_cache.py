"""With a KV cache in int8, every way of decoding gives the tokens of plain decoding with that cache."""

import pytest
import torch
from tiny_decoders import (
    ALL_DRAFTS,
    FREE,
    PLAIN,
    batch_ids,
    ids,
    model_of,
    random_prompt,
    speculative,
    tiny_decoder,
)

from layerskip.decoding import PrefixCache

DECODERS = {
    "pytorch-float32": {},
    "compiled-float32": {"compiled": True},
    "compiled-bfloat16": {"compiled": True, "dtype": torch.bfloat16},
}


@pytest.fixture(params=DECODERS.values(), ids=DECODERS.keys())
def decoder(request):
    if "compiled" in request.param:
        request.getfixturevalue("compiled_kernels")
    return tiny_decoder("qwen3-sliding", kv_cache="int8", **request.param)


def test_drafts_change_no_token(decoder):
    for length in (1, 40):
        prompt = random_prompt(decoder, length)
        plain = ids(decoder, prompt, PLAIN)
        for config in (speculative(1, 5), speculative(3, 2)):
            assert ids(decoder, prompt, config) == plain
        assert ids(decoder, prompt, ALL_DRAFTS, measured=FREE) == plain


def test_batches_change_no_token(decoder):
    prompts = [random_prompt(decoder, length, seed=length) for length in (3, 40, 17)]
    plain = [ids(decoder, prompt, PLAIN) for prompt in prompts]
    for config in (PLAIN, speculative(2, 4)):
        assert batch_ids(decoder, prompts, config) == plain


def test_a_prefix_that_is_not_computed_again_changes_no_token(decoder):
    model, prefix = model_of(decoder), PrefixCache()
    prompt = random_prompt(decoder, 40)
    for turn in range(3):
        options = {"mode": "plain", "max_new_tokens": 10}
        answer = model.answer(prompt, prefix=prefix, **options).complete().token_ids
        assert answer == model.generate(prompt, **options).token_ids
        prompt = [*prompt, *answer, *random_prompt(decoder, 5, seed=turn)]
