"""Writes tiny models of families beyond Llama as GGUF files, as llama.cpp's converter does.

Tensor names are those of the `gguf` package's own table; a row below has what the converter changes.
"""

import dataclasses

import gguf
import gguf_files
import torch
from gguf import GGUFWriter

import tiny_models

LAYER_TYPES = ["sliding_attention"] * 5 + ["full_attention"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of `tiny_models`, with changes, as a file.

    Attributes:
        case: of `tiny_models`.
        arch: the architecture of the file.
        changes: what llama.cpp has no field for takes its value.
        fields: of the file -> of the config.
        is_permuted: rows of Q and K are in the interleaved rotary layout.
        adds_one: norms are stored as 1 + w.
        exact: llama.cpp computes the same; it has no windows of phi3.
    """

    case: str
    arch: gguf.MODEL_ARCH
    changes: dict = dataclasses.field(default_factory=dict)
    fields: dict = dataclasses.field(default_factory=dict)
    is_permuted: bool = False
    adds_one: bool = False
    exact: bool = True


_ARCH = gguf.MODEL_ARCH
_WINDOW = {"attention.sliding_window": "sliding_window"}
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_EXPERTS = {"expert_used_count": "num_experts_per_tok"}
CASES = {
    "gemma2": Case(
        "gemma2",
        _ARCH.GEMMA2,
        {"query_pre_attn_scalar": 24},
        {"attn_logit_softcapping": "attn_logit_softcapping"} | _FINAL_CAP | _WINDOW,
        adds_one=True,
    ),
    "gemma3": Case(
        "gemma3",
        _ARCH.GEMMA3,
        {
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 6,
            "layer_types": LAYER_TYPES,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        _WINDOW,
        adds_one=True,
    ),
    "phi3": Case("phi3", _ARCH.PHI3, fields=_WINDOW, exact=False),
    "phi4-mini": Case(  # llama.cpp's context is at least 256, from where it takes the long factors
        "phi4-mini",
        _ARCH.PHI3,
        {"original_max_position_embeddings": 256, "max_position_embeddings": 2048},
    ),
    "smollm3": Case("smollm3", _ARCH.SMOLLM3, {"no_rope_layers": [1, 1, 1, 0]}, is_permuted=True),
    "granite": Case(
        "granite",
        _ARCH.GRANITE,
        {"attention_bias": False, "mlp_bias": False},
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        is_permuted=True,
    ),
    "olmo2": Case("olmo2", _ARCH.OLMO2),
    "mixtral": Case(
        "mixtral",
        _ARCH.LLAMA,
        {"sliding_window": None},
        {"expert_count": "num_local_experts"} | _EXPERTS,
        is_permuted=True,
    ),
    "qwen3-moe": Case(
        "qwen3-moe",
        _ARCH.QWEN3MOE,
        {"decoder_sparse_step": 1},
        {
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        }
        | _EXPERTS,
    ),
}


def build(name, **changes):
    """The transformers model of a case."""
    return tiny_models.build(CASES[name].case, **(CASES[name].changes | changes))


def write(path, name, model):
    """Write a model of `build` in float32, with a tiny byte-level tokenizer."""
    case, config = CASES[name], model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch])
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    fields |= {key: getattr(config, of_config) for key, of_config in case.fields.items()}
    for key, value in fields.items():
        gguf_files.ADD[type(value)](writer, f"{writer.arch}.{key}", value)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(float(model.model.rotary_emb.attention_scaling))
        for kind in ("long", "short"):
            factors = torch.tensor(rope[f"{kind}_factor"]).numpy()
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    gguf_files.write_tokenizer(writer, "gpt-2", config.vocab_size)
    names = gguf.get_tensor_name_map(case.arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if key.endswith("experts.gate_up_proj"):
            prefix = f"blk.{key.split('.')[2]}."
            for part, half in zip(
                ("gate", "up"),
                values.swapaxes(0, 1).reshape(2, -1, *values.shape[::2]),
                strict=True,
            ):
                writer.add_tensor(f"{prefix}ffn_{part}_exps.weight", half.swapaxes(0, 1).copy())
            continue
        if key.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{key.split('.')[2]}.ffn_down_exps.weight", values)
            continue
        if case.is_permuted and (n_heads := heads.get(key.split(".")[-2])):
            values = gguf_files.permute(values, n_heads).copy()
        if case.adds_one and key.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
