"""The numbers that a decoder is built from, whatever file they came from."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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


_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def ropes_of(config: Mapping[str, Any], n_layers: int) -> tuple[Rope | None, ...]:
    """One for all layers, one for each kind of layer (Gemma 3), or none in some (SmolLM3)."""
    fields = dict(config.get("rope_parameters") or {})
    by_kind = {kind: _rope(own, config) for kind, own in fields.items() if isinstance(own, Mapping)}
    if by_kind:
        return tuple(by_kind[kind] for kind in config["layer_types"])
    turns = config.get("no_rope_layers") or (True,) * n_layers  # 0 where a layer has none
    rope = _rope(fields, config)
    return tuple(rope if turn else None for turn in turns[:n_layers])


def check_ropes(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a config as it is stored names a scaling that is unknown here.

    Older ones have it under another name, and other words for LongRoPE in Phi-3.
    """
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for own in (fields, *(part for part in fields.values() if isinstance(part, Mapping))):
        kind = own.get("rope_type") or own.get("type") or "default"
        if kind not in _KINDS and config.get("model_type") != "phi3":
            raise _unknown(kind)


def _unknown(kind: object) -> UnsupportedModelError:
    known = f"{', '.join(_KINDS[:-1])} and {_KINDS[-1]}"
    return UnsupportedModelError(f"rotary scaling {kind!r} is not supported ({known} are)")


def _rope(fields: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    kind = fields.get("rope_type", "default")
    plain = Rope(
        theta=float(fields.get("rope_theta", 10_000.0)),
        fraction=float(fields.get("partial_rotary_factor", 1.0)),
    )
    if kind in ("default", "dynamic"):  # alike up to the longest context that there is
        return plain
    if kind == "linear":
        return dataclasses.replace(plain, kind="linear", factor=float(fields["factor"]))
    if kind == "llama3":
        return dataclasses.replace(
            plain,
            kind="llama3",
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_positions=int(fields["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return _yarn(plain, fields, config)
    if kind == "longrope":
        return _longrope(plain, fields, config["max_position_embeddings"])
    raise _unknown(kind)


def _yarn(plain: Rope, fields: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    """YaRN (arXiv 2309.00071, section 3.2): pairs that turn often stay as they are, slow ones are
    slowed down by `factor`, and those between are blended."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = plain.turned(int(config.get("head_dim") or hidden // heads))
    original = int(fields["original_max_position_embeddings"])
    factor = float(fields.get("factor") or config["max_position_embeddings"] / original)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(plain.theta))

    low = pair_that_turns(fields.get("beta_fast") or 32)
    high = pair_that_turns(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    slowed = [min(max((pair - low) / span, 0.0), 1.0) for pair in range(dim // 2)]
    magnitude = fields.get("attention_factor")
    if magnitude is None:
        one, other = fields.get("mscale"), fields.get("mscale_all_dim")
        scales = (one, other) if one and other else (1.0, 0.0)
        grown = [0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales]
        magnitude = grown[0] / grown[1]
    return dataclasses.replace(
        plain,
        frequency_factors=tuple(1.0 / (share / factor + 1.0 - share) for share in slowed),
        magnitude=float(magnitude),
    )


def _longrope(plain: Rope, fields: Mapping[str, Any], max_positions: int) -> Rope:
    """LongRoPE (arXiv 2402.13753); the magnitude is its section 3.3 where the config names none."""
    original = int(fields["original_max_position_embeddings"])
    stretch = float(fields.get("factor") or max_positions / original)
    magnitude = fields.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + max(math.log(stretch), 0.0) / math.log(original))
    return dataclasses.replace(
        plain,
        original_max_positions=original,
        frequency_factors=tuple(map(float, fields["short_factor"])),
        long_factors=tuple(map(float, fields["long_factor"])),
        magnitude=float(magnitude),
    )
