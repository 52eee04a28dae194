"""Rotary position embedding as one complex multiplication for queries, keys and values together.

Queries and keys are kept in the interleaved layout: dimensions (2i, 2i+1) of a head are the real and
imaginary part of one complex number, which position t turns by the angle t * frequency_i. Values are
turned by zero, and so are the dimensions and layers without rotary embedding: one product serves the
whole fused QKV row of every family.
"""

import math

import torch
from torch import Tensor

from layerskip.model.architecture import Architecture, Rope


class Rotary:
    """The turns of all layers; layers with the same rotary embedding are of one kind.

    Attributes:
        kinds: the kind of every layer.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        a = architecture
        self._ropes = list(dict.fromkeys(a.ropes))
        self.kinds = tuple(self._ropes.index(rope) for rope in a.ropes)
        self._heads = a.n_heads + a.n_kv_heads, a.n_kv_heads
        self._short = [frequencies(rope, a.head_dim).to(device) for rope in self._ropes]
        self._long = [
            frequencies(rope, a.head_dim, is_long=True).to(device) for rope in self._ropes
        ]
        self._magnitudes = [magnitudes(rope, a.head_dim).to(device) for rope in self._ropes]
        self._tables: dict[tuple[int, bool], Tensor] = {}

    @property
    def n_kinds(self) -> int:
        """How many kinds of rotary embedding the layers have."""
        return len(self._ropes)

    def turns(self, kind: int, positions: Tensor, capacity: int) -> Tensor:
        """See the function `turns`.

        `capacity` is how far the cache's positions may reach: a whole generation uses LongRoPE's
        factors for short contexts or those for long ones, since keys are kept turned.
        """
        freqs = self._frequencies(kind, self._is_long(kind, capacity))
        return turns(positions, freqs, *self._heads, self._magnitudes[kind])

    def table(self, kind: int, capacity: int) -> Tensor:
        """The turns of queries and keys at every position of a cache, made once and kept.

        Returns:
            [at least `capacity`, head_dim / 2], complex64.
        """
        key = kind, self._is_long(kind, capacity)
        table = self._tables.get(key)
        if table is None or len(table) < capacity:
            freqs = self._frequencies(*key)
            positions = torch.arange(1 << (capacity - 1).bit_length(), device=freqs.device)[None]
            table = turns(positions, freqs, 1, 0, self._magnitudes[kind])[0, :, 0].contiguous()
            self._tables[key] = table
        return table

    def _is_long(self, kind: int, capacity: int) -> bool:
        rope = self._ropes[kind]
        return rope is not None and rope.is_long(capacity)

    def _frequencies(self, kind: int, is_long: bool) -> Tensor:
        return (self._long if is_long else self._short)[kind]


def frequencies(rope: Rope | None, head_dim: int, *, is_long: bool = False) -> Tensor:
    """Angle per position for each of the `head_dim / 2` complex pairs, float32; 0 where none turns.

    The `llama3` scaling keeps short wavelengths, divides long ones by `factor`, and blends between.
    `is_long` takes LongRoPE's factors for contexts above the original one.
    """
    if rope is None:
        return torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
    dim = rope.turned(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    freqs = _scaled(rope, 1.0 / (rope.theta**exponents), is_long)
    return torch.nn.functional.pad(freqs, (0, (head_dim - dim) // 2))


def magnitudes(rope: Rope | None, head_dim: int) -> Tensor:
    """What each of the `head_dim / 2` complex pairs of queries and keys is multiplied by."""
    result = torch.ones(head_dim // 2, dtype=torch.float32, device="cpu")
    if rope is not None:
        result[: rope.turned(head_dim) // 2] = rope.magnitude
    return result


def _scaled(rope: Rope, freqs: Tensor, is_long: bool) -> Tensor:
    factors = rope.frequency_factors
    if is_long and rope.long_factors is not None:
        factors = rope.long_factors
    if factors is not None:
        freqs = freqs / torch.tensor(factors, dtype=torch.float32, device="cpu")
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        full_turns = rope.original_max_positions * freqs / (2 * math.pi)  # in the old context
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((full_turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
        return keep * freqs + (1.0 - keep) * freqs / rope.factor
    return freqs


def turns(
    positions: Tensor, freqs: Tensor, n_turned: int, n_still: int, magnitudes: Tensor
) -> Tensor:
    """Complex numbers that turn the heads of a fused QKV row.

    Args:
        positions: [B, T], the position of every row.
        freqs: [head_dim / 2], from `frequencies`.
        n_turned: heads that turn with the position (queries and keys).
        n_still: heads that do not (values).
        magnitudes: [head_dim / 2], from `magnitudes`; 1 but for LongRoPE.

    Returns:
        [B, T, n_turned + n_still, head_dim / 2], complex64.
    """
    angles = positions[..., None, None].float() * freqs
    turned = torch.polar(magnitudes.expand_as(angles), angles)
    b, t = positions.shape
    still = torch.ones((), dtype=turned.dtype, device=turned.device).expand(
        b, t, n_still, freqs.numel()
    )
    return torch.cat([turned.expand(b, t, n_turned, -1), still], dim=2)


def interleave(rows: Tensor, head_dim: int, turned: int) -> Tensor:
    """Reorder Q or K rows from two halves (i, i + turned/2) to neighbours (2i, 2i+1).

    Works on weights [heads * head_dim, D], biases [heads * head_dim] and norms [head_dim]. What lies
    beyond the first `turned` dimensions of a head stays where it is.
    """
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    halves = heads[:, :turned].unflatten(1, (2, turned // 2))
    neighbours = halves.transpose(1, 2).flatten(1, 2)
    return torch.cat([neighbours, heads[:, turned:]], dim=1).reshape(rows.shape)
