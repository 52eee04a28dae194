"""The table of model families: everything that differs between them; all else is one decoder.

A family is one row of `FAMILIES`. Numbers come from the config and are read the same way for all
(`from_config`). Biases and tied heads are not in the table: they follow from the tensors of a
checkpoint, and `loader.py` refuses a tensor that it has no use for. The names of tensors in GGUF files
follow from the names in the table and `GGUF_NAMES`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from layerskip.model.architecture import (
    MAX_LAYERS,
    MAX_SIZE,
    Activation,
    Architecture,
    Mixture,
    UnsupportedModelError,
    check_ropes,
    check_size,
    ropes_of,
)

# Given to transformers with every config, so that it chooses its own attention and experts: a config
# may name compiled code on the hub there.
OWN_KERNELS: Mapping[str, Any] = {"attn_implementation": None, "experts_implementation": None}
# Fields of a config that name code or other weights; they are not copied into any result.
NOT_PASSED_ON = (
    *("auto_map", "transformers_weights"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Tensor names of a family, without `.weight` and `.bias`; None: it has no such part.

    The defaults are Llama's. Several names are projections of one input that become one product; a
    single name in their place is a tensor that holds them all, concatenated.
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
    """Suffixes of buffers that older versions of transformers saved, and no longer read."""


# Fields of `Names` -> names in GGUF files; those of a layer follow "blk.N.".
GGUF_NAMES: Mapping[str, str | tuple[str, ...]] = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "attention_out": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": "ffn_down",
    "attention_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
    "router": "ffn_gate_inp",
}
GGUF_FUSED = {"qkv": "attn_qkv", "gate_up": "ffn_up"}  # where the family has one tensor for all
# The experts of a layer are one tensor in GGUF files, [experts, rows, columns].
GGUF_EXPERTS: Mapping[str, str | tuple[str, ...]] = {
    "expert_gate_up": ("ffn_gate_exps", "ffn_up_exps"),
    "expert_down": "ffn_down_exps",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row: the differences to a plain Llama.

    Attributes:
        is_exported: `layerskip export` writes models of the family.
        gguf_name: the architecture's name in GGUF files; None: there are none.
        gguf_rotary: the row order of Q and K in GGUF files: `"interleaved"` where the converter
            permuted them for rotary pairs (2i, 2i+1), `"halves"` where it left them as transformers
            has them. None: such a file is read as that of another family.
        gguf_windows: of as many layers in GGUF files, the last attends to all positions, the others
            have the sliding window; llama.cpp's default where the file has no pattern. 1: all have it.
        gguf_local_theta: the rotary base of the layers with a window, where it is one of its own.
        gguf_ropes: of as many layers, the last has no rotary embedding; 0: all have it.
        gguf_wide: the number of layers of the model whose attention llama.cpp scales by
            (D / heads)^-1/2 instead of head_dim^-1/2.
        gguf_scales: GGUF files have Granite's multipliers.
        gguf_activation: of the MLP; GGUF files name none.
        has_experts: layers have a mixture of experts.
        window: a sliding window applies to every layer that the config does not name (`"all"`), only
            to layers that `layer_types` names (`"named"`), or to none (None).
        names: the names of tensors.
        norm_offset: added to the weights of norms; 1 where files hold w of a norm with (1 + w).
        qk_norm: Q/K norms are over each head or over the whole projection; None: there are none.
        qkv_by_head: the fused QKV tensor is ordered by head: Q, K and V of head 0, then of head 1, ...
        is_gated: the MLP multiplies its activation with a second projection.
        norm_bias: norms subtract the mean and have a bias.
        scales_embedding: embeddings are multiplied by sqrt(D).
        caps_attention: scores have a soft cap, if the config names one.
        normalizes_experts: always, not only where the config has `norm_topk_prob`.
    """

    is_exported: bool = False
    gguf_name: str | None = None
    gguf_rotary: Literal["interleaved", "halves"] | None = None
    gguf_windows: int = 1
    gguf_local_theta: float | None = None
    gguf_ropes: int = 0
    gguf_wide: int | None = None
    gguf_scales: bool = False
    gguf_activation: Activation = "silu"
    has_experts: bool = False
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
# By transformers' model type. GGUF has no name for Mistral: its files are those of a Llama.
FAMILIES = {
    "llama": Family(is_exported=True, gguf_name="llama", gguf_rotary="interleaved"),
    "mistral": Family(is_exported=True, gguf_name="llama", window="all"),
    "qwen2": Family(is_exported=True, gguf_name="qwen2", gguf_rotary="halves", window="named"),
    "qwen3": Family(
        is_exported=True, gguf_name="qwen3", gguf_rotary="halves", window="named", qk_norm="head"
    ),
    "gemma2": Family(
        gguf_name="gemma2",
        gguf_rotary="halves",
        gguf_windows=2,
        gguf_wide=46,
        gguf_activation="gelu_tanh",
        window="named",
        names=_GEMMA,
        caps_attention=True,
        norm_offset=1.0,
        scales_embedding=True,
    ),
    "gemma3_text": Family(
        gguf_name="gemma3",
        gguf_rotary="halves",
        gguf_windows=6,
        gguf_local_theta=10_000.0,
        gguf_wide=62,
        gguf_activation="gelu_tanh",
        window="named",
        names=_GEMMA,
        qk_norm="head",
        norm_offset=1.0,
        scales_embedding=True,
    ),
    "phi3": Family(  # Phi-3, Phi-3.5, Phi-4, Phi-4-mini
        gguf_name="phi3",
        gguf_rotary="halves",
        window="all",
        names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    ),
    "olmo2": Family(
        gguf_name="olmo2",
        gguf_rotary="halves",
        qk_norm="projection",
        names=Names(
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
    ),
    "smollm3": Family(gguf_name="smollm3", gguf_rotary="interleaved", gguf_ropes=4, window="named"),
    "granite": Family(gguf_name="granite", gguf_rotary="interleaved", gguf_scales=True),
    "mixtral": Family(
        gguf_name="llama",
        gguf_rotary="interleaved",
        has_experts=True,
        window="all",
        normalizes_experts=True,
        names=Names(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            expert_gate_up=("w1", "w3"),
            expert_down="w2",
        ),
    ),
    "qwen3_moe": Family(
        gguf_name="qwen3moe",
        gguf_rotary="halves",
        has_experts=True,
        window="all",
        qk_norm="head",
    ),
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
_REFUSED = {
    "gpt2": "it has learned position embeddings instead of rotary ones, and transposed weights",
    "gemma3": "it reads images too; its text part alone (gemma3_text) is supported",
}
# Fields of a config by which transformers allocates memory; those that may be 0 mean "none" then.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
)
_SIZES_OR_0 = ("num_labels", "num_local_experts", "num_experts")


def family_of(model_type: str) -> str:
    """Return the row of a transformers `model_type` or a GGUF architecture name.

    Raises:
        UnsupportedModelError: there is none; the message names the type and lists what is supported.
    """
    if model_type in FAMILIES:
        return model_type
    why = f" ({_REFUSED[model_type]})" if model_type in _REFUSED else ""
    raise UnsupportedModelError(
        f"the architecture {model_type!r} is not supported{why};"
        f" supported are: {', '.join(FAMILIES)}"
    )


def family_of_gguf(architecture: str, has_experts: bool) -> str:
    """Return the row of a GGUF architecture name; a mixture of Llamas is a Mixtral.

    Raises:
        UnsupportedModelError: there is none.
    """
    rows = {name: row for name, row in FAMILIES.items() if row.gguf_name and row.gguf_rotary}
    for name, row in rows.items():
        if (row.gguf_name, row.has_experts) == (architecture, has_experts):
            return name
    what = f"{architecture} models with{'' if has_experts else 'out'} experts"
    if architecture not in {row.gguf_name for row in rows.values()}:
        what = f"{architecture} models"
    raise UnsupportedModelError(
        f"GGUF files of {what} are not read"
        f" ({', '.join(dict.fromkeys(str(row.gguf_name) for row in rows.values()))} are);"
        " take safetensors"
    )


def gguf_names(family: str) -> dict[str, str]:
    """Map tensor names in a family's GGUF files to transformers', without `.weight` and `.bias`.

    Names of tensors have "{}" for the index of the layer, and those of experts a second one.
    """
    names, table = FAMILIES[family].names, dict[str, str]()
    for field, in_gguf in {**GGUF_NAMES, **GGUF_EXPERTS}.items():
        hf_names = _tuple(getattr(names, field) or ())
        stored = _tuple(
            GGUF_FUSED[field] if field in GGUF_FUSED and len(hf_names) == 1 else in_gguf
        )
        is_of_layer = field not in ("embedding", "final_norm", "head")
        prefixes = ("blk.{}.", names.layer) if is_of_layer else ("", "")
        expert = names.expert if field in GGUF_EXPERTS else ""
        for gguf_name, name in zip(stored, hf_names, strict=bool(hf_names)):
            table[prefixes[0] + gguf_name] = prefixes[1] + expert + name
    return table


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a `config.json` has impossible sizes, before transformers allocates them.

    The model type may be any; a size that is missing or null is not checked.
    """
    for name in (*_SIZES, *_SIZES_OR_0):
        value, is_many = config.get(name), name in ("num_hidden_layers", *_SIZES_OR_0)
        if value is not None and not (value == 0 and name in _SIZES_OR_0):
            check_size(name, value, MAX_LAYERS if is_many else MAX_SIZE)
    if isinstance(text_config := config.get("text_config"), Mapping):
        check_sizes(text_config)


def check_not_quantized(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if the weights of a transformers config are quantized."""
    if quantization := config.get("quantization_config") or config.get("quantization"):
        method = dict(quantization).get("quant_method")
        how = f"by {method!r}" if method else "in MLX's format"
        raise UnsupportedModelError(f"weights quantized {how} are not supported")


def check(config: Mapping[str, Any]) -> None:
    """Check a transformers config, as it is stored or with its defaults filled in.

    Raises:
        UnsupportedModelError: this decoder cannot run such a model.
        ValueError: a size or a number in it is impossible.
    """
    family_of(str(config.get("model_type")))
    check_sizes(config)
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
    """Raise UnsupportedModelError if a transformers config names the file of its weights."""
    if named := config.get("transformers_weights"):
        raise UnsupportedModelError(f"a config that names its weights ({named}) is not supported")


def check_causal(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if a transformers config asks for attention to later positions."""
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise UnsupportedModelError("attention to later positions is not supported")


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Read a transformers config, as `PreTrainedConfig.to_dict()` gives it.

    Raises:
        UnsupportedModelError, ValueError: see `check`.
    """
    check(config)
    name = str(config["model_type"])
    family = FAMILIES[name]
    n_layers, n_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
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
