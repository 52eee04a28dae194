"""The one KV cache of both stages: slots that are written at a position and read up to a length.

It is allocated once. Shortening it sets a length; nothing is copied (KVQ, section 4.3 of the paper).
"""

import dataclasses

import torch
from torch import Tensor

from layerskip.model.families import Architecture


class KVCache:
    """Keys and values of every layer, with a length for every row.

    Attributes:
        slots: [L, 2, B, KV heads, S, head_dim]; index 0 of the second axis holds keys, 1 values.
        lengths: [B] int64 on the host: how many positions of each row are settled. The next call of
            `Decoder.run` writes from there on. Set it back to forget positions.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        batch_size: int = 1,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        a = architecture
        # Zeros, since a masked slot still enters the weighted sum, where 0 * nan would be nan.
        self.slots = torch.zeros(
            a.n_layers,
            2,
            batch_size,
            a.n_kv_heads,
            capacity,
            a.head_dim,
            dtype=dtype,
            device=device,
        )
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self._layers = list(self.slots.unbind(0))

    @property
    def capacity(self) -> int:
        """S: how many positions a row can hold."""
        return self.slots.shape[-2]

    def span(self, n: int) -> "Span":
        """The next n positions of every row.

        Raises:
            ValueError: a row has no room for them.
        """
        start, end = int(self.lengths.min()), int(self.lengths.max()) + n
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} positions, {end} are needed")
        positions = self.lengths[:, None] + torch.arange(n)
        return Span(
            positions=positions.to(self.slots.device), start=start, end=end, even=end - start == n
        )

    def write(self, layer: int, span: "Span", keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a span and return all that may be read.

        Args:
            layer: counted from 0.
            span: from `span(T)`.
            keys_values: [B, T, 2, KV heads, head_dim], in any floating dtype.

        Returns:
            keys and values up to the span's end, each [B, KV heads, end, head_dim].
        """
        slots = self._layers[layer]
        if span.even:
            slots[:, :, :, span.start : span.end].copy_(keys_values.permute(2, 0, 3, 1, 4))
        else:
            rows = torch.arange(slots.shape[1], device=slots.device)[:, None]
            slots[:, rows, :, span.positions] = keys_values.to(slots.dtype)
        keys, values = slots[:, :, :, : span.end].unbind(0)
        return keys, values


@dataclasses.dataclass(frozen=True)
class Span:
    """Positions that one call of `Decoder.run` computes.

    `even` says that all rows start at the same position; then `start` is that position.
    """

    positions: Tensor  # [B, T] int64
    start: int
    end: int
    even: bool

    def mask(self, window: int | None, dtype: torch.dtype, groups: int) -> Tensor | None:
        """What each query may see, as numbers to add to its scores; None where it sees everything.

        Returns:
            [B, 1, groups * T, end]: queries of the `groups` heads that share a KV head follow one
            another in the third axis.
        """
        b, t = self.positions.shape
        sees_all = t == 1 and self.even and (window is None or window >= self.end)
        if sees_all:
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        queries = self.positions[..., None]  # [B, T, 1]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(b, t, self.end, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, float("-inf"))
        return mask[:, None].expand(b, groups, t, self.end).reshape(b, 1, groups * t, self.end)
