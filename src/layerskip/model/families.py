"""What differs between model families, as a table; everything else is one decoder.

A family is one row of `FAMILIES`. Biases, Q/K norms and tied heads are not in the table: a checkpoint
says by the tensors it holds whether it has them, and `weights.py` refuses a tensor it has no use for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3"]


class UnsupportedModelError(ValueError):
    """The checkpoint needs something that the decoder does not have; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, and how the frequencies are scaled for long contexts.

    `frequency_factors` (one number for each of `head_dim / 2` frequencies) divide the frequencies;
    GGUF files carry the scaling of Llama 3.1 and later in this form.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    frequency_factors: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers that a decoder is built from, whatever file they came from.

    `sliding_windows[l]` is how many positions layer l sees (its own included), None for all of them.
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
    rope: Rope
    sliding_windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for field in ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, it has to be 1 or above")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_kv_heads} KV heads do not divide {self.n_heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, rotary pairs need an even number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row: the model types of transformers and the architecture names of GGUF that it covers.

    `window` says where a sliding window applies: in every layer that the config does not name
    (`"all"`), only in the layers that `layer_types` names (`"named"`), or nowhere (None).
    `gguf_rotary` is the row order of Q and K in GGUF files: `"interleaved"` where the converter
    permuted them for rotary pairs (2i, 2i+1), `"halves"` where it left them as transformers has them.
    """

    model_types: tuple[str, ...]
    gguf_names: tuple[str, ...]
    window: Literal["all", "named"] | None
    gguf_rotary: Literal["interleaved", "halves"]


FAMILIES = {
    "llama": Family(
        model_types=("llama",), gguf_names=("llama",), window=None, gguf_rotary="interleaved"
    ),
    "mistral": Family(
        model_types=("mistral",), gguf_names=(), window="all", gguf_rotary="interleaved"
    ),
    "qwen2": Family(
        model_types=("qwen2",), gguf_names=("qwen2",), window="named", gguf_rotary="halves"
    ),
    "qwen3": Family(
        model_types=("qwen3",), gguf_names=("qwen3",), window="named", gguf_rotary="halves"
    ),
}
_ACTIVATIONS = ("silu", "swish")


def family_of(model_type: str) -> str:
    """The row for a transformers `model_type` or a GGUF architecture name.

    Raises:
        UnsupportedModelError: no row covers it; the message names it and lists what is covered.
    """
    for name, family in FAMILIES.items():
        if model_type in family.model_types or model_type in family.gguf_names:
            return name
    raise UnsupportedModelError(
        f"the architecture {model_type!r} is not supported; supported are: {', '.join(FAMILIES)}"
    )


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read a transformers config, as `PreTrainedConfig.to_dict()` gives it.

    Raises:
        UnsupportedModelError: the architecture, its activation or its rotary scaling is unknown.
    """
    family = family_of(str(config.get("model_type")))
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(f"the activation {activation!r} is not supported (only silu)")
    quantization = config.get("quantization_config")
    if quantization:
        method = dict(quantization).get("quant_method")
        raise UnsupportedModelError(f"weights quantized by {method!r} are not supported")
    n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    return Architecture(
        family=family,
        n_layers=n_layers,
        hidden_size=int(config["hidden_size"]),
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // n_heads),
        ffn_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        norm_eps=float(config["rms_norm_eps"]),
        max_context=int(config["max_position_embeddings"]),
        rope=_rope(config),
        sliding_windows=_windows(config, FAMILIES[family].window, n_layers),
    )


def _windows(
    config: Mapping[str, Any], rule: Literal["all", "named"] | None, n_layers: int
) -> tuple[int | None, ...]:
    window, types = config.get("sliding_window"), config.get("layer_types")
    if rule is None or window is None or (rule == "named" and not types):
        return (None,) * n_layers
    if not types:
        return (int(window),) * n_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


def _rope(config: Mapping[str, Any]) -> Rope:
    fields = dict(config.get("rope_parameters") or {})
    kind = fields.get("rope_type", "default")
    if kind == "default":
        return Rope(theta=float(fields.get("rope_theta", 10_000.0)))
    if kind == "linear":
        return Rope(
            theta=float(fields["rope_theta"]), kind="linear", factor=float(fields["factor"])
        )
    if kind == "llama3":
        return Rope(
            theta=float(fields["rope_theta"]),
            kind="llama3",
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_positions=int(fields["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(
        f"rotary scaling {kind!r} is not supported (default, linear and llama3 are)"
    )
