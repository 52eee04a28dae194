"""What differs between model families, as a table; everything else is one decoder.

A family is one row of `FAMILIES`. Numbers come from the config and are read the same way for all
(`from_config`). Biases and tied heads are not in the table: a checkpoint says by the tensors it holds
whether it has them, and `assembly.py` refuses a tensor it has no use for.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from layerskip.model.architecture import (
    Activation,
    Architecture,
    Mixture,
    UnsupportedModelError,
    check_ropes,
    ropes_of,
)

# Given to transformers with any config: what computes attention and experts is transformers' own choice.
# A config may name compiled code of the hub there.
OWN_KERNELS: Mapping[str, Any] = {"attn_implementation": None, "experts_implementation": None}
# Fields of a config that name code or other weights: they travel with no checkpoint.
NOT_PASSED_ON = (
    *("auto_map", "transformers_weights"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What a family's files call each part, without `.weight` and `.bias`; None: it has no such part.

    The defaults are Llama's. Several names are projections of one input that become one product; a
    single name in their place is a tensor that holds them all, one after the other.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    attention_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_post_norm: str | None = None
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names of buffers that older versions of transformers saved, and no longer read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row: what is its own, beside names and defaults that most have.

    Attributes:
        window: where a sliding window applies: in every layer that the config does not name
            (`"all"`), only in the layers that `layer_types` names (`"named"`), or nowhere (None).
        gguf_rotary: the row order of Q and K in GGUF files: `"interleaved"` where the converter
            permuted them for rotary pairs (2i, 2i+1), `"halves"` where it left them as transformers
            has them. None: this package neither reads nor writes GGUF files of the family.
        names: what the files call each part.
        norm_offset: added to the weights of norms; 1 where files hold w of a norm with (1 + w).
        qk_norm: Q/K norms are over each head or over the whole projection; None: there are none.
        qkv_by_head: the fused QKV tensor holds Q, K and V of one head after those of another.
        is_gated: the MLP multiplies its activation with a second projection.
        norm_bias: norms subtract the mean and have a bias.
        scales_embedding: embeddings are multiplied by sqrt(D).
        caps_attention: scores have a soft cap, if the config names one.
        normalizes_experts: always, or where the config's `norm_topk_prob` says so.
    """

    gguf_rotary: Literal["interleaved", "halves"] | None = None
    window: Literal["all", "named"] | None = None
    names: Names = Names()
    norm_offset: float = 0.0
    qk_norm: Literal["head", "projection"] | None = None
    qkv_by_head: bool = False
    is_gated: bool = True
    norm_bias: bool = False
    scales_embedding: bool = False
    caps_attention: bool = False
    normalizes_experts: bool = False


_GEMMA = Names(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
# By the model type of transformers, which GGUF has as architecture where it has one.
FAMILIES = {
    "llama": Family(gguf_rotary="interleaved"),
    "mistral": Family(window="all"),
    "qwen2": Family(window="named", gguf_rotary="halves"),
    "qwen3": Family(window="named", gguf_rotary="halves", qk_norm="head"),
    "gemma2": Family(
        window="named",
        names=_GEMMA,
        caps_attention=True,
        norm_offset=1.0,
        scales_embedding=True,
    ),
    "gemma3_text": Family(
        window="named",
        names=_GEMMA,
        qk_norm="head",
        norm_offset=1.0,
        scales_embedding=True,
    ),
    "phi3": Family(  # Phi-3, Phi-3.5, Phi-4, Phi-4-mini
        window="all",
        names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    ),
    "olmo2": Family(
        qk_norm="projection",
        names=Names(
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
    ),
    "smollm3": Family(window="named"),
    "granite": Family(),
    "mixtral": Family(
        window="all",
        normalizes_experts=True,
        names=Names(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            expert_gate_up=("w1", "w3"),
            expert_down="w2",
        ),
    ),
    "qwen3_moe": Family(window="all", qk_norm="head"),
    "gpt_neox": Family(  # Pythia
        qkv_by_head=True,
        is_gated=False,
        norm_bias=True,
        names=Names(
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            head="embed_out",
            layer="gpt_neox.layers.{}.",
            qkv=("attention.query_key_value",),
            attention_out="attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        ),
    ),
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # another way to write the same
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MOST_LAYERS = 10_000
_REFUSED = {
    "gpt2": "it learns positions where this decoder turns queries and keys, and it transposes weights",
    "gemma3": "it reads images too; its text part alone (gemma3_text) is supported",
}


def family_of(model_type: str) -> str:
    """The row of a transformers `model_type` or a GGUF architecture name, if there is one.

    Raises:
        UnsupportedModelError: no row covers it; the message names it and lists what is covered.
    """
    if model_type in FAMILIES:
        return model_type
    why = f" ({_REFUSED[model_type]})" if model_type in _REFUSED else ""
    raise UnsupportedModelError(
        f"the architecture {model_type!r} is not supported{why};"
        f" supported are: {', '.join(FAMILIES)}"
    )


def check_n_layers(n_layers: int) -> None:
    """Raise ValueError for no number of layers, before anything is made for each of them."""
    if not 1 <= n_layers <= _MOST_LAYERS:
        raise ValueError(f"n_layers is {n_layers}, it has to be from 1 to {_MOST_LAYERS}")


def check_not_quantized(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a transformers config says that its weights are quantized."""
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization:
        method = dict(quantization).get("quant_method")
        how = f"by {method!r}" if method else "in MLX's format"
        raise UnsupportedModelError(f"weights quantized {how} are not supported")


def check(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a transformers config of a model that this decoder cannot run."""
    family_of(str(config.get("model_type")))
    check_not_quantized(config)
    check_causal(config)
    check_weights_unnamed(config)
    check_ropes(config)
    activation = _activation(config)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"the activation {activation!r} is not supported (only {', '.join(_ACTIVATIONS)})"
        )


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_activation") or config.get("hidden_act", "silu"))


def check_weights_unnamed(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a transformers config names the file of the weights."""
    if named := config.get("transformers_weights"):
        raise UnsupportedModelError(f"a config that names its weights ({named}) is not supported")


def check_causal(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a transformers config says that positions see later ones."""
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UnsupportedModelError("attention to later positions is not supported")


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read a transformers config, as `PreTrainedConfig.to_dict()` gives it.

    Raises:
        UnsupportedModelError: the architecture, its activation or its rotary scaling is unknown, or
            its weights are quantized.
    """
    check(config)
    name = str(config["model_type"])
    family = FAMILIES[name]
    n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    check_n_layers(n_layers)
    hidden_size = int(config["hidden_size"])
    return Architecture(
        family=name,
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_dim=int(config.get("head_dim") or hidden_size // n_heads),
        ffn_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        norm_eps=float(config["rms_norm_eps" if "rms_norm_eps" in config else "layer_norm_eps"]),
        max_context=int(config["max_position_embeddings"]),
        sliding_windows=_windows(config, family.window, n_layers),
        ropes=ropes_of(config, n_layers),
        activation=_ACTIVATIONS[_activation(config)],
        attention_scale=_attention_scale(config),
        attention_cap=_number(config, "attn_logit_softcapping") if family.caps_attention else None,
        logit_cap=_number(config, "final_logit_softcapping"),
        embedding_scale=(
            math.sqrt(hidden_size)
            if family.scales_embedding
            else _number(config, "embedding_multiplier")
        ),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        parallel_residual=bool(config.get("use_parallel_residual")),
        mixture=_mixture(config, family, n_layers),
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


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    return None if value is None else float(value)


def _attention_scale(config: Mapping[str, Any]) -> float | None:
    if (scalar := config.get("query_pre_attn_scalar")) is not None:  # Gemma
        return 1.0 / math.sqrt(float(scalar))
    return _number(config, "attention_multiplier")  # Granite


def _mixture(config: Mapping[str, Any], family: Family, n_layers: int) -> Mixture | None:
    n_experts = config.get("num_local_experts") or config.get("num_experts")
    if not n_experts:
        return None
    every, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return Mixture(
        n_experts=int(n_experts),
        top_k=int(config["num_experts_per_tok"]),
        ffn_size=int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        normalized=family.normalizes_experts or bool(config.get("norm_topk_prob")),
        layers=frozenset(i for i in range(n_layers) if (i + 1) % every == 0 and i not in plain),
    )
