"""The ceiling of decoding at batch 1: every pass has to read the weights of its layers from memory."""

import statistics
from collections.abc import Iterable

import torch

from layerskip.decoding import Step
from layerskip.decoding.clock import device_clock
from layerskip.model import Decoder
from layerskip.model.large_pages import in_large_pages


def read_bandwidth(device: torch.device, *, n_bytes: int | None = None, passes: int = 5) -> float:
    """Bytes per second at which this machine reads memory: a sum over much more than its caches hold.

    The median of several passes, with the threads that PyTorch uses at this moment. The memory is given
    back afterwards.
    """
    if n_bytes is None:
        # Of a GPU enough for its launch and the waiting not to count, where there is so much.
        n_bytes = 2**30
        if device.type == "cuda":
            n_bytes = min(2**32, torch.cuda.mem_get_info(device)[0] // 2)
    shape, dtype = (n_bytes // 4,), torch.float32
    if device.type == "cpu":  # as the weights lie
        memory = in_large_pages(shape, dtype).fill_(1)
    else:
        memory = torch.ones(shape, dtype=dtype, device=device)
    now = device_clock(device)
    memory.sum()
    times = []
    for _ in range(passes):
        start = now()
        memory.sum()
        times.append(now() - start)
    del memory
    if device.type == "cuda":  # PyTorch would keep it from other processes, such as peers
        torch.cuda.empty_cache()
    return n_bytes / statistics.median(times)


def weight_bytes_read(
    decoder: Decoder,
    steps: Iterable[Step],
    *,
    exit_layer: int | None,
    drafting: bool,
    draft_vocabulary: int | None = None,
) -> int:
    """Bytes of weights that these steps had to read, keys and values left out.

    A round whose n tokens were drafted by an early exit runs the first E layers n + 1 times (the last
    drafted token has to pass them too), the head n times for the draft and once more for a token that
    was left out as unsure, and the other layers and the head once to verify. What was drafted beyond the
    end of the answer was read for, too. Where n-grams were the draft, every layer and the head are read
    once; where they follow a draft they read nothing.

    Args:
        decoder: the model.
        steps: passes of decoding, without the prompt's own.
        exit_layer: layers run for one token; None means all.
        drafting: whether the steps are rounds of self-speculative decoding.
        draft_vocabulary: tokens that the early exit may draft; None means all.
    """
    head = decoder.head.weight_bytes
    # On average: some layers of a mixture may have none.
    layer = (decoder.weight_bytes - head) // len(decoder.layers)
    exit_at = len(decoder.layers) if exit_layer is None else exit_layer
    size = decoder.architecture.vocab_size
    share = min(draft_vocabulary or size, size) / size
    total = 0
    for step in steps:
        scored = step.from_exit + step.refused
        total += (step.from_exit + 1) * exit_at * layer + round(scored * head * share) + head
        if drafting:
            total += (len(decoder.layers) - exit_at) * layer
    return total
