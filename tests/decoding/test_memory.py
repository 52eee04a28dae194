"""One set of weights and one KV cache, whatever the mode: tensors are counted while it decodes."""

import gc

import pytest
import torch
from tiny_decoders import GREEDY, LAYERS, PLAIN, random_prompt, speculative, tiny_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip.decoding import Sampling, generate

# Long enough that one layer's keys are larger than anything else that a step may allocate.
PROMPT, NEW_TOKENS = 300, 9
PLANS = [PLAIN, speculative(1, 4), speculative(LAYERS // 2, 2), speculative(LAYERS, 8)]
SAMPLINGS = [GREEDY, Sampling(temperature=1.0, repetition_penalty=1.2)]


def storages_alive():
    """Bytes of every block of memory that a tensor refers to, by address."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # those of a compiler, which others leave, have none
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


class Largest(TorchDispatchMode):
    """Remembers the largest block of memory that an operation has made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_one_cache_and_one_set_of_weights(plan, sampling):
    decoder = tiny_decoder("llama2")
    prompt = random_prompt(decoder, PROMPT)
    cache_bytes = decoder.new_cache(PROMPT + NEW_TOKENS - 1).slots.nbytes
    one_layers_keys = cache_bytes // (2 * LAYERS)
    before = storages_alive()
    loop = generate(
        decoder, prompt, plan=plan, sampling=sampling, max_new_tokens=NEW_TOKENS, seed=0
    )
    for i, _ in enumerate(loop):
        new = {at: size for at, size in storages_alive().items() if before.get(at) != size}
        large = [size for size in new.values() if size >= one_layers_keys]
        assert large == [cache_bytes], i
        assert sum(new.values()) < cache_bytes + one_layers_keys, i


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_round_copies_neither_cache_nor_weights(plan):
    decoder = tiny_decoder("llama2")
    loop = generate(
        decoder,
        random_prompt(decoder, PROMPT),
        plan=plan,
        sampling=GREEDY,
        max_new_tokens=NEW_TOKENS,
    )
    next(loop)  # the prompt's own pass allocates the cache
    with Largest() as largest:
        for _ in loop:
            pass
    a = decoder.architecture
    one_layers_keys = a.n_kv_heads * (PROMPT + NEW_TOKENS) * a.head_dim * 4
    smallest_weight = a.hidden_size * a.n_heads * a.head_dim * 4
    assert 0 < largest.bytes < min(one_layers_keys, smallest_weight)
