"""The order of rows: batches of similar length, the same whenever the epoch is begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_BATCHES_SORTED_TOGETHER = 50


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows, then sorts stretches of many batches by length, so that little is padding.

    The order depends on seed and epoch alone; transformers' own sampler draws from the global
    generator, whose state a resume in a later epoch does not have.

    Args:
        lengths: tokens of every row.
        batch_size: rows of a batch.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        size = self._batch_size
        stretch = size * _BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), stretch):
            together = slice(start, start + stretch)
            order[together] = sorted(order[together], key=lambda row: -self._lengths[row])
        n_whole = len(order) // size
        for number in torch.randperm(n_whole, generator=generator).tolist():
            yield from order[number * size : (number + 1) * size]
        # A short batch must stay the last one: the loader cuts the stream into equal batches.
        yield from order[n_whole * size :]
