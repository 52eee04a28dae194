"""Tiny random transformers models of every supported family, as references and as checkpoints."""

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip.model import StepCosts, load

LAYERS = 4
# As `tune` would have measured them.
COSTS = StepCosts(
    dtype="float32",
    weights="16bit",
    device="cpu",
    kernels="pytorch",
    exit_layer=2,
    draft_step=0.25,
    draft_tokens_scored=99,
    head=0.125,
    passes=(1.0, 1.25),
    overhead=0.0,
    machine="here",
)
_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 24.0],
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Every case is one model type and what it changes; together they cross all that families differ in.
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama3.1": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama3.2": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "vocab_size": 101}),
    "llama-narrow-heads": ("llama", {"head_dim": 10}),
    "smollm2": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}
        | {"tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "vocab_size": 89}),
    "mistral-unlimited": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"vocab_size": 97}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-mha": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen3-sliding": (
        "qwen3",
        {"head_dim": 16, "attention_bias": True, "use_sliding_window": True}
        | {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 16, "sliding_window": 6}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 64, "tie_word_embeddings": False}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "query_pre_attn_scalar": 16, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"rope_parameters": _GEMMA3_ROPE},
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi4-mini": (
        "phi3",
        {"tie_word_embeddings": True, "original_max_position_embeddings": 64}
        | {"rope_parameters": _LONGROPE, "partial_rotary_factor": 0.75},
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-sliding": ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.4}
        | {"attention_multiplier": 0.5, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-tied": (
        "granite",
        {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "intermediate_size": 40, "sliding_window": 6}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 24}
        | {"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3-moe-unnormalized": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"mlp_only_layers": [0, 3], "use_sliding_window": True, "sliding_window": 8},
    ),
    "gpt-neox": ("gpt_neox", {"hidden_act": "gelu", "num_key_value_heads": 4}),
    "gpt-neox-serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "num_key_value_heads": 4, "vocab_size": 97}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        | {"partial_rotary_factor": 1.0},
    ),
}

# The first case of every family.
ONE_OF_EACH = list({kind: case for case, (kind, _) in reversed(CASES.items())}.values())[::-1]


def build(case, **changes):
    """The transformers model of a case, in float32 and evaluation mode.

    Its norms and biases are random too, so that one that is left out or misplaced shows.
    """
    model_type, own = CASES[case]
    fields = copy.deepcopy({**_COMMON, **own, **changes})  # a config changes what it is given
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(sum(map(ord, case)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)
        elif parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0.0, 0.15)
    return model.eval()


@functools.cache
def reference(case):
    """`build(case)`, made once; do not change it."""
    return build(case)


def checkpoint(case, folder, *, dtype=torch.float32, **how):
    """Our reading of a case, by way of files as transformers saves them."""
    reference(case).save_pretrained(folder)
    return load(folder, dtype=dtype, **how)


def token_ids(case, *shape, seed=0):
    """Random tokens of a case's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(reference(case).config.vocab_size, shape, generator=generator)


@torch.no_grad()
def reference_logits(model, tokens):
    """Logits [B, T, V] of one full forward pass, without any cache."""
    return model(tokens, use_cache=False).logits


def logits_of(decoder, tokens):
    """Our decoder's logits [B, T, V] of the same."""
    cache = decoder.new_cache(tokens.shape[1], batch_size=tokens.shape[0])
    return decoder.logits(decoder.run(decoder.embed(tokens), 0, LAYERS, cache))
