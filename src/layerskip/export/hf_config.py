"""`config.json` and `generation_config.json` of an exported checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from layerskip.export.source import Source
from layerskip.fileio import check_within, read_json
from layerskip.model import UnsupportedModelError
from layerskip.model import checkpoint as settings
from layerskip.model import decoder as rotary
from layerskip.model import tokenizer as older_names
from layerskip.model.architecture import Rope
from layerskip.model.checkpoint import Rounding, recorded
from layerskip.model.families import NOT_PASSED_ON
from layerskip.model.tokenizer import special_token_ids
from layerskip.model.weights import GgufFile

_OF_THE_WHOLE_MODEL = ("assistant_early_exit", settings.KEY)  # means nothing to a draft model
_FACTORS_TOLERANCE = 1e-3  # relative; the factors in GGUF files are float32


def config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """The source's own config with what the export changes, or one made from a GGUF file's metadata.

    Raises:
        UnsupportedModelError: transformers has no config that says what the GGUF file says.
    """
    tensors = source.files.tensors
    if isinstance(tensors, GgufFile):
        fields = _from_gguf(source, tensors)
    else:
        file = source.files.path / "config.json"
        check_within(file, is_read=True)  # another file of this machine is not to be passed on
        stored = read_json(file)
        fields = {key: value for key, value in stored.items() if key not in NOT_PASSED_ON}
        fields["tie_word_embeddings"] = source.files.tied
        n_layers = source.architecture.n_layers
        fields["num_hidden_layers"] = n_layers
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:n_layers]
    fields["dtype"] = str(dtype).removeprefix("torch.")
    return fields | older_names.of_config(fields)


def generation_config(
    source: Source, roundings: Mapping[str, Rounding] | None = None
) -> dict[str, Any]:
    """The source's own settings; a draft model has no exits and no settings of the whole model.

    What they say of quantized weights holds for the source's own numbers. An export that changes those
    gives in `roundings` what is known of the new ones.
    """
    path = source.files.path / settings.FILE
    if path.is_file():
        check_within(path)
        fields = read_json(path)
    else:
        tensors, ends = source.files.tensors, source.files.settings.end_tokens
        if isinstance(tensors, GgufFile):
            known: Mapping[str, Any] = special_token_ids(tensors)
        else:
            known = read_json(source.files.path / "config.json")
        fields = settings.special_tokens(known, ends)
    if source.exit_layer is not None:
        for key in _OF_THE_WHOLE_MODEL:
            fields.pop(key, None)
    if roundings is not None:
        fields[settings.KEY] = recorded(fields.get(settings.KEY), roundings)
    return {key: value for key, value in fields.items() if key != settings.KEY or value}


def _from_gguf(source: Source, file: GgufFile) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    a, names = source.architecture, file.names()
    windows = set(a.sliding_windows)
    # In GGUF Mistral is called llama; only transformers' Mistral has a window.
    model_type = "mistral" if a.family == "llama" and windows != {None} else a.family
    own: dict[str, Any] = {}
    if model_type == "llama":
        own["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in names
    if model_type in ("llama", "qwen3"):
        own["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    if model_type == "mistral":
        own["sliding_window"] = a.sliding_windows[0]
    elif windows != {None}:
        own |= {"use_sliding_window": True, "sliding_window": a.sliding_windows[0]}
        own["layer_types"] = ["sliding_attention"] * a.n_layers
    made = AutoConfig.for_model(
        model_type,
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_size,
        num_hidden_layers=a.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_context,
        rms_norm_eps=a.norm_eps,
        rope_parameters=_rope_parameters(source),
        tie_word_embeddings=source.files.tied,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        **{"bos_token_id": None, "eos_token_id": None} | special_token_ids(file),
        **own,
    )
    fields: dict[str, Any] = json.loads(made.to_json_string(use_diff=True))
    return fields


def _rope_parameters(source: Source) -> dict[str, Any]:
    rope = source.rope
    if rope.frequency_factors is not None:
        if rope.kind != "default":
            raise UnsupportedModelError(
                f"this GGUF file has rotary frequency factors and {rope.kind} scaling; transformers has"
                " no config for both"
            )
        rope = _llama3(rope, source.architecture.head_dim)
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
        fields["original_max_position_embeddings"] = rope.original_max_positions
    return fields


def _llama3(rope: Rope, head_dim: int) -> Rope:
    """The `llama3` scaling that gives the factors of a GGUF file.

    The largest factor is the scaling's, the bounds of its middle part are 1 and 4 in every Llama; what
    is left to find is the original context, a power of two.
    """
    assert rope.frequency_factors is not None
    wanted = torch.tensor(rope.frequency_factors)
    plain = rotary.frequencies(Rope(theta=rope.theta), head_dim)
    for power in range(4, 21):
        guess = Rope(
            theta=rope.theta,
            kind="llama3",
            factor=round(float(wanted.max()), 4),
            original_max_positions=2**power,
        )
        factors = plain / rotary.frequencies(guess, head_dim)
        if torch.allclose(factors, wanted, rtol=_FACTORS_TOLERANCE, atol=0.0):
            return guess
    raise UnsupportedModelError(
        "the rotary frequency factors of this GGUF file are not those of Llama 3.1 and later;"
        " transformers has no config for them"
    )
