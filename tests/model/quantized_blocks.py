"""Random weights in every format of GGML's blocks."""

import torch
from gguf import GGMLQuantizationType as Kind

from layerskip.model.block_formats import FORMATS
from layerskip.model.quantize import Quantized

KINDS = list(FORMATS)
# Where a block has float16 numbers, beyond the first two bytes of most formats.
_HALVES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,)}
_WITH_OFFSETS = (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K)


def random_blocks(kind, n_out=80, n_in=256, size=0.01):
    """A matrix whose bytes are random, but for scales and offsets of about this size."""
    generator = torch.Generator().manual_seed(n_out + n_in)
    n_weights, n_bytes = FORMATS[kind].block_weights, FORMATS[kind].block_bytes
    shape = n_out, n_in // n_weights
    data = torch.randint(0, 256, (*shape, n_bytes), generator=generator, dtype=torch.uint8)
    for begin in _HALVES.get(kind, (0, 2) if kind in _WITH_OFFSETS else (0,)):
        halves = size * torch.randn(*shape, 1, generator=generator)
        data[..., begin : begin + 2] = halves.half().view(torch.uint8)
    return Quantized(kind, data.flatten(1))
