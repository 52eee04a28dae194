"""Tiny random causal LMs of transformers, of every family the recipe names, and batches."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 4
VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_EXPERTS = {"output_router_logits": True}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        **_EXPERTS,
    },
}


def build(family, **changes):
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Larger than the usual initialisation, so that a layer matters and a fault shows.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return model.train()


def batch_of(rows=6, tokens=12, padding="right", seed=0):
    """Rows of different length, padded on one side; labels from token 3 on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        length = tokens - row % 4
        unused = slice(length, None) if padding == "right" else slice(0, tokens - length)
        mask[row, unused] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
