"""The numbers that a decoder is built from, whatever file they came from."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

RopeKind = Literal["default", "linear", "llama3"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
_MOST_POSITIONS = 2**31 - 1  # that the compiled kernels count


class UnsupportedModelError(ValueError):
    """The checkpoint needs something that the decoder does not have; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, and how the frequencies are scaled for long contexts.

    `frequency_factors` (one number for each turned pair of dimensions) divide the frequencies; GGUF
    files carry the scaling of Llama 3.1 and later in this form. LongRoPE (arXiv 2402.13753) has a
    second set of them, `long_factors`, for contexts above `original_max_positions`, and a `magnitude`
    that queries and keys are multiplied by. `fraction` is the share of a head's dimensions that turns.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    frequency_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    magnitude: float = 1.0
    fraction: float = 1.0

    def alike(self, capacities: Sequence[int]) -> bool:
        """Whether caches that hold so many positions turn them alike."""
        return len({self.is_long(capacity) for capacity in capacities}) == 1

    def is_long(self, capacity: int) -> bool:
        """Whether a cache that holds so many positions takes the factors for long contexts."""
        return self.long_factors is not None and capacity > self.original_max_positions

    def turned(self, head_dim: int) -> int:
        """How many dimensions of a head turn, counted from its first."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts: `top_k` of `n_experts` gated MLPs answer for each position.

    The chosen experts' probabilities are made to sum to 1 where `normalized`. `layers` have the
    mixture in the place of their MLP, the others a plain one.
    """

    n_experts: int
    top_k: int
    ffn_size: int
    normalized: bool
    layers: frozenset[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What `assembly.build` makes a decoder from.

    Attributes:
        family: the row of `FAMILIES`.
        sliding_windows: how many positions layer l sees (its own included), None or 0 for all of them.
        ropes: the rotary embedding of layer l, None where it has none.
        attention_scale: queries times keys are multiplied by it, None for 1 / sqrt(head_dim).
        attention_cap: c, where scores s become c * tanh(s / c).
        logit_cap: the same for logits.
        embedding_scale: embeddings are multiplied by it before the first layer.
        residual_scale: what attention and MLP add is multiplied by it.
        logit_scale: logits are multiplied by it.
        parallel_residual: attention and MLP of a layer read the same hidden states.
        mixture: the mixture of experts, None where every layer has an MLP.
    """

    family: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    max_context: int
    sliding_windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    parallel_residual: bool = False
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        for field in ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, it has to be 1 or above")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_kv_heads} KV heads do not divide {self.n_heads} heads")
        turned = {rope.turned(self.head_dim) for rope in self.ropes if rope is not None}
        if odd := [n for n in (self.head_dim, *turned) if n % 2]:
            raise ValueError(f"head_dim is {odd[0]}, rotary pairs need an even number")
        if any(window is not None and window < 0 for window in self.sliding_windows):
            raise ValueError(f"a sliding window is {min(w for w in self.sliding_windows if w)}")
        windows = tuple(min(w, _MOST_POSITIONS) if w else None for w in self.sliding_windows)
        object.__setattr__(self, "sliding_windows", windows)
        for name in ("sliding_windows", "ropes"):
            if len(getattr(self, name)) != self.n_layers:
                raise ValueError(f"{name} are of {len(getattr(self, name))} layers, not all")
