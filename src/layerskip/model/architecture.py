"""The numbers that a decoder is built from, whatever file they come from, and their limits."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
MAX_LAYERS = 10_000
MAX_SIZE = 2**24  # of any other dimension; larger ones are refused before memory is allocated
_MAX_POSITIONS = 2**31 - 1  # the compiled kernels count positions in int32


class UnsupportedModelError(ValueError):
    """The checkpoint needs a feature that the decoder does not have; the message names it."""


def check_size(name: str, value: Any, maximum: int = MAX_SIZE) -> None:
    """Raise ValueError unless a dimension is a whole number from 1 to `maximum`."""
    if type(value) is not int or not 1 <= value <= maximum:
        raise ValueError(f"{name} is {value!r}, it has to be a whole number from 1 to {maximum}")


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0 as a float; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, it has to be a number above 0")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, and the scaling of the frequencies for long contexts.

    Attributes:
        frequency_factors: one number for each rotary pair, which divides its frequency; GGUF files
            store the scaling of Llama 3.1 and later in this form.
        long_factors: LongRoPE's (arXiv 2402.13753) second set of factors, for contexts above
            `original_max_positions`.
        magnitude: multiplies queries and keys.
        fraction: the part of a head's dimensions that is rotated.
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

    def __post_init__(self) -> None:
        positive("rope_theta", self.theta)
        positive("the factor of rotary scaling", self.factor)
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"partial_rotary_factor is {self.fraction:g}, it has to be above 0 and at most 1"
            )
        for factors in (self.frequency_factors, self.long_factors):
            for number in factors or ():
                positive("a factor of a rotary frequency", number)

    def alike(self, capacities: Sequence[int]) -> bool:
        """Return True if caches of these capacities use the same frequencies."""
        return len({self.is_long(capacity) for capacity in capacities}) == 1

    def is_long(self, capacity: int) -> bool:
        """Return True if a cache of this capacity uses the factors for long contexts."""
        return self.long_factors is not None and capacity > self.original_max_positions

    def turned(self, head_dim: int) -> int:
        """Return the number of rotated dimensions of a head, counted from its first."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts: each position goes through `top_k` of `n_experts` gated MLPs.

    The chosen experts' probabilities are scaled to sum to 1 if `normalized`. `layers` have the mixture
    in place of their MLP, all other layers a plain MLP.
    """

    n_experts: int
    top_k: int
    ffn_size: int
    normalized: bool
    layers: frozenset[int]

    def __post_init__(self) -> None:
        check_size("the number of experts", self.n_experts, MAX_LAYERS)
        check_size("experts per token", self.top_k, self.n_experts)
        check_size("the size of an expert", self.ffn_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's dimensions and the numbers in its forward pass; validated when it is created.

    Attributes:
        family: the row of `FAMILIES`.
        sliding_windows: positions that each layer attends to (its own included), None or 0 for all.
        ropes: the rotary embedding of each layer, None for none.
        attention_scale: multiplies queries times keys, None for 1 / sqrt(head_dim).
        attention_cap: c, where scores s become c * tanh(s / c).
        logit_cap: the same for logits.
        embedding_scale: multiplies embeddings before the first layer.
        residual_scale: multiplies the outputs of attention and MLP.
        logit_scale: multiplies logits.
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
        check_size("n_layers", self.n_layers, MAX_LAYERS)
        for field in ("hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size", "vocab_size"):
            check_size(field, getattr(self, field))
        check_size("max_context", self.max_context, _MAX_POSITIONS)
        positive("the epsilon of norms", self.norm_eps)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_kv_heads} KV heads do not divide {self.n_heads} heads")
        for name in ("sliding_windows", "ropes"):
            if len(getattr(self, name)) != self.n_layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not one a layer")
        self._check_ropes()
        if any(window is not None and window < 0 for window in self.sliding_windows):
            raise ValueError(f"a sliding window is {min(w for w in self.sliding_windows if w)}")
        windows = tuple(min(w, _MAX_POSITIONS) if w else None for w in self.sliding_windows)
        object.__setattr__(self, "sliding_windows", windows)

    def _check_ropes(self) -> None:
        ropes = {rope for rope in self.ropes if rope is not None}
        rotated = {rope.turned(self.head_dim) for rope in ropes}
        if odd := [n for n in (self.head_dim, *rotated) if n % 2]:
            raise ValueError(f"head_dim is {odd[0]}, rotary pairs need an even number")
        for rope in ropes:
            n_pairs = rope.turned(self.head_dim) // 2
            for factors in (rope.frequency_factors, rope.long_factors):
                if factors is not None and len(factors) != n_pairs:
                    raise ValueError(
                        f"rotary scaling has {len(factors)} factors, {n_pairs} are needed"
                    )


_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def ropes_of(config: Mapping[str, Any], n_layers: int) -> tuple[Rope | None, ...]:
    """Return the rotary embedding of each layer from a transformers config.

    It is one for all layers, one for each kind of layer (Gemma 3), or absent in some (SmolLM3).
    """
    fields = dict(config.get("rope_parameters") or {})
    by_layer_type = {
        layer_type: _rope(parameters, config)
        for layer_type, parameters in fields.items()
        if isinstance(parameters, Mapping)
    }
    if by_layer_type:
        return tuple(by_layer_type[layer_type] for layer_type in config["layer_types"])
    has_rope = config.get("no_rope_layers") or (True,) * n_layers  # 0 for a layer without
    rope = _rope(fields, config)
    return tuple(rope if flag else None for flag in has_rope[:n_layers])


def check_ropes(config: Mapping[str, Any]) -> None:
    """Check the rotary scaling of a `config.json` as it is stored, before transformers reads it.

    Older configs have the scaling under another name, and Phi-3 has other words for LongRoPE.

    Raises:
        UnsupportedModelError: its type is not supported.
        ValueError: a number in it cannot be right.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rotary scaling is {scaling!r}, an object is needed")
    for parameters in (scaling, *(part for part in scaling.values() if isinstance(part, Mapping))):
        rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        if rope_type not in _ROPE_TYPES and config.get("model_type") != "phi3":
            raise _unsupported(rope_type)
        if parameters.get("factor") is not None:
            positive("the factor of rotary scaling", parameters["factor"])
        for name in ("short_factor", "long_factor"):
            factors = parameters.get(name, [1.0])
            if not isinstance(factors, list) or not factors:
                raise ValueError(f"{name} of rotary scaling is {factors!r}, numbers are needed")
    for fields in (config, scaling):
        if (fraction := fields.get("partial_rotary_factor")) is not None:
            Rope(fraction=positive("partial_rotary_factor", fraction))
        if fields.get("rope_theta") is not None:
            positive("rope_theta", fields["rope_theta"])


def _unsupported(rope_type: object) -> UnsupportedModelError:
    supported = f"{', '.join(_ROPE_TYPES[:-1])} and {_ROPE_TYPES[-1]}"
    return UnsupportedModelError(f"rotary scaling {rope_type!r} is not supported ({supported} are)")


def _rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    rope_type = parameters.get("rope_type", "default")
    plain = Rope(
        theta=float(parameters.get("rope_theta", 10_000.0)),
        fraction=float(parameters.get("partial_rotary_factor", 1.0)),
    )
    if rope_type in ("default", "dynamic"):  # the same up to the model's maximum context
        return plain
    if rope_type == "linear":
        return dataclasses.replace(plain, kind="linear", factor=float(parameters["factor"]))
    if rope_type == "llama3":
        return dataclasses.replace(
            plain,
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    if rope_type == "yarn":
        return _yarn(plain, parameters, config)
    if rope_type == "longrope":
        return _longrope(plain, parameters, config["max_position_embeddings"])
    raise _unsupported(rope_type)


def _yarn(plain: Rope, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    """Apply YaRN (arXiv 2309.00071, section 3.2).

    Fast rotary pairs keep their frequency, slow ones are divided by `factor`, and those between are
    interpolated.
    """
    hidden_size, n_heads = config["hidden_size"], config["num_attention_heads"]
    dim = plain.turned(int(config.get("head_dim") or hidden_size // n_heads))
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or config["max_position_embeddings"] / original)

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(plain.theta))

    low = pair_with_rotations(parameters.get("beta_fast") or 32)
    high = pair_with_rotations(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(dim // 2)]
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scales = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
        magnitudes = [0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales]
        magnitude = magnitudes[0] / magnitudes[1]
    return dataclasses.replace(
        plain,
        frequency_factors=tuple(1.0 / (weight / factor + 1.0 - weight) for weight in ramp),
        magnitude=float(magnitude),
    )


def _longrope(plain: Rope, parameters: Mapping[str, Any], max_positions: int) -> Rope:
    """Apply LongRoPE (arXiv 2402.13753); the default magnitude is from its section 3.3."""
    original = int(parameters["original_max_position_embeddings"])
    stretch = float(parameters.get("factor") or max_positions / original)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + max(math.log(stretch), 0.0) / math.log(original))
    return dataclasses.replace(
        plain,
        original_max_positions=original,
        frequency_factors=tuple(map(float, parameters["short_factor"])),
        long_factors=tuple(map(float, parameters["long_factor"])),
        magnitude=float(magnitude),
    )
