"""A transformers checkpoint: safetensors, config, tokenizer and generation settings."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from layerskip.export.source import Calibration, ExportReport, Progress, Source, cast, new_folder
from layerskip.fileio import read_json, share_weights, write_json
from layerskip.model import CheckpointError, UnsupportedModelError, families
from layerskip.model import checkpoint as settings
from layerskip.model import decoder as rotary
from layerskip.model import tokenizer as legacy_fields
from layerskip.model.architecture import Rope
from layerskip.model.checkpoint import Rounding, recorded
from layerskip.model.families import NOT_PASSED_ON
from layerskip.model.tokenizer import special_token_ids
from layerskip.model.weights import GgufFile

HF_WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHARD_BYTES = 2_000_000_000  # also the size of what is in memory at a time
_STORAGE_TYPES = {dtype: name.upper() for name, dtype in HF_WEIGHTS.items()}
_WHOLE_MODEL_KEYS = ("assistant_early_exit", settings.KEY)  # without meaning in a draft model
_FACTORS_TOLERANCE = 1e-3  # relative; the factors in GGUF files are float32


def to_hf(
    source: Source,
    path: Path,
    *,
    weights: str | None = None,
    calibrated: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write a checkpoint that transformers, vLLM and others load without this package.

    Args:
        source: from `open_source`.
        path: the folder to make.
        weights: "f32", "f16" or "bf16"; None keeps each tensor as it is stored, and writes quantized
            ones dequantized to float32.
        calibrated: from `calibrate`: replaces the source's matrices, in float32.
        overwrite: replace an existing checkpoint.
        progress: called after each tensor.

    Raises:
        ExportError: the folder cannot be written.
        ValueError: the source is damaged, or transformers has no config for it.
    """
    from transformers import AutoConfig

    if weights is not None and weights not in HF_WEIGHTS:
        raise ValueError(f"weights is {weights!r}; of an hf checkpoint: {', '.join(HF_WEIGHTS)}")
    tensors, names = source.files.tensors, source.names
    kinds = {name: weights or tensors.stored_as(name).lower() for name in names}
    # Other storage types, such as quantized blocks, are read as float32.
    dtypes = {name: HF_WEIGHTS.get(kind, torch.float32) for name, kind in kinds.items()}
    replaced = {} if calibrated is None else calibrated.tensors
    dtypes.update(dict.fromkeys(replaced, torch.float32))
    n_bytes = {
        name: torch.Size(tensors.shape(name)).numel() * dtypes[name].itemsize for name in names
    }
    fields = config(source, Counter(dtypes.values()).most_common(1)[0][0])
    written, carried_over = 0, 0
    with new_folder(path, n_bytes=sum(n_bytes.values()), overwrite=overwrite) as folder:
        write_json(folder / "config.json", fields)
        check_tensors(source, AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        generation_fields = generation_config(source, _roundings(weights, calibrated))
        write_json(folder / "generation_config.json", generation_fields)
        source.files.write_tokenizer(folder)
        split = split_state_dict_into_shards_factory(
            n_bytes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        for file, shard in split.filename_to_tensors.items():
            state: dict[str, Tensor] = {}
            for name in shard:
                if name in replaced:
                    state[name] = replaced[name].dequantize()
                else:
                    state[name] = cast(source.read(name), dtypes[name], name).contiguous()
                    carried_over += tensors.stored_as(name) == _STORAGE_TYPES[dtypes[name]]
                written += 1
                progress(written, len(names))
            save_file(state, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
        share_weights(folder)
    return ExportReport(
        path=path,
        format="hf" if source.exit_layer is None else "hf-draft",
        exit_layer=source.exit_layer,
        layers=source.architecture.n_layers,
        tied_head=source.files.tied,
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        tensors=len(names),
        stored_as=dict(Counter(_STORAGE_TYPES[dtype] for dtype in dtypes.values())),
        carried_over=carried_over,
        nll_change=None if calibrated is None else calibrated.rounding.nll_change,
    )


def _roundings(weights: str | None, calibrated: Calibration | None) -> dict[str, Rounding] | None:
    """The measured int8 and int4 quality of the new weights; None if they are the source's."""
    if calibrated is not None:
        return {"int4": calibrated.rounding}
    return {} if weights in ("f16", "bf16") else None


def check_tensors(source: Source, config: Any) -> None:
    """Compare the tensors with the model that transformers builds from a config.

    Raises:
        CheckpointError: transformers would miss a tensor, ignore one, or expect another shape.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **families.OWN_KERNELS
            )
    except Exception as error:  # a C++ error has a stack trace in its further lines
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"transformers builds no {config.model_type} model from this configuration: {reason}"
        ) from error
    shapes = {name: source.files.tensors.shape(name) for name in source.names}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if source.files.tied:
        expected.pop("lm_head.weight")
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"the tensor {name} is {shapes.get(name, 'missing')}, transformers expects"
                f" {expected.get(name, 'none')} in a {config.model_type} model"
            )


def config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Return `config.json`: the source's with the changes of the export, or made from GGUF metadata.

    Raises:
        UnsupportedModelError: transformers has no config for the GGUF file's metadata.
    """
    tensors = source.files.tensors
    if isinstance(tensors, GgufFile):
        fields = _config_from_gguf(source, tensors)
    else:
        stored = read_json(source.files.path / "config.json")
        fields = {key: value for key, value in stored.items() if key not in NOT_PASSED_ON}
        fields["tie_word_embeddings"] = source.files.tied
        n_layers = source.architecture.n_layers
        fields["num_hidden_layers"] = n_layers
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:n_layers]
    fields["dtype"] = str(dtype).removeprefix("torch.")
    return fields | legacy_fields.of_config(fields)


def generation_config(
    source: Source, roundings: Mapping[str, Rounding] | None = None
) -> dict[str, Any]:
    """Return `generation_config.json`: the source's; in a draft model without exit settings.

    Args:
        source: the source.
        roundings: measured quality of quantized weights, if the export changes the weights; None keeps
            the source's.
    """
    path = source.files.path / settings.FILE
    if path.is_file():
        fields = read_json(path)
    else:
        tensors, end_tokens = source.files.tensors, source.files.settings.end_tokens
        if isinstance(tensors, GgufFile):
            token_ids: Mapping[str, Any] = special_token_ids(tensors)
        else:
            token_ids = read_json(source.files.path / "config.json")
        fields = settings.special_tokens(token_ids, end_tokens)
    if source.exit_layer is not None:
        for key in _WHOLE_MODEL_KEYS:
            fields.pop(key, None)
    if roundings is not None:
        fields[settings.KEY] = recorded(fields.get(settings.KEY), roundings)
    return {key: value for key, value in fields.items() if key != settings.KEY or value}


def _config_from_gguf(source: Source, file: GgufFile) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    a, names = source.architecture, file.names()
    windows = set(a.sliding_windows)
    # GGUF calls Mistral llama; in transformers only Mistral has a window.
    model_type = "mistral" if a.family == "llama" and windows != {None} else a.family
    family_fields: dict[str, Any] = {}
    if model_type == "llama":
        family_fields["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in names
    if model_type in ("llama", "qwen3"):
        family_fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    if model_type == "mistral":
        family_fields["sliding_window"] = a.sliding_windows[0]
    elif windows != {None}:
        family_fields |= {"use_sliding_window": True, "sliding_window": a.sliding_windows[0]}
        family_fields["layer_types"] = ["sliding_attention"] * a.n_layers
    hf_config = AutoConfig.for_model(
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
        **family_fields,
    )
    fields: dict[str, Any] = json.loads(hf_config.to_json_string(use_diff=True))
    return fields


def _rope_parameters(source: Source) -> dict[str, Any]:
    rope = source.rope
    if rope.frequency_factors is not None:
        if rope.kind != "default":
            raise UnsupportedModelError(
                f"this GGUF file has rotary frequency factors and {rope.kind} scaling; transformers has"
                " no config for both"
            )
        rope = _llama3_scaling(rope, source.architecture.head_dim)
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
        fields["original_max_position_embeddings"] = rope.original_max_positions
    return fields


def _llama3_scaling(rope: Rope, head_dim: int) -> Rope:
    """The `llama3` scaling that yields the frequency factors of a GGUF file.

    Its factor is the largest of them, its middle part lies between 1 and 4 in every Llama; the original
    context, a power of two, is found by search.
    """
    expected = torch.tensor(rope.frequency_factors)
    unscaled = rotary.frequencies(Rope(theta=rope.theta), head_dim)
    for power in range(4, 21):
        guess = Rope(
            theta=rope.theta,
            kind="llama3",
            factor=round(float(expected.max()), 4),
            original_max_positions=2**power,
        )
        factors = unscaled / rotary.frequencies(guess, head_dim)
        if torch.allclose(factors, expected, rtol=_FACTORS_TOLERANCE, atol=0.0):
            return guess
    raise UnsupportedModelError(
        "the rotary frequency factors of this GGUF file are not those of Llama 3.1 and later;"
        " transformers has no config for them"
    )
