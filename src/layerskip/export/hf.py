"""A plain transformers checkpoint: safetensors, config, tokenizer and generation settings."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from layerskip.export import hf_config
from layerskip.export.calibrate import Calibrated
from layerskip.export.source import ExportReport, Progress, Source, cast, new_folder
from layerskip.fileio import share_weights, write_json
from layerskip.model import CheckpointError, families
from layerskip.model import checkpoint as row_order
from layerskip.model.checkpoint import Rounding

HF_WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHARD_BYTES = 2_000_000_000  # what is in memory at a time
_STORED_AS = {dtype: name.upper() for name, dtype in HF_WEIGHTS.items()}


def to_hf(
    source: Source,
    path: Path,
    *,
    weights: str | None = None,
    calibrated: Calibrated | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write a checkpoint that transformers, vLLM and others load without this package.

    Args:
        source: from `open_source`.
        path: the folder to make.
        weights: "f32", "f16" or "bf16"; None keeps each tensor as it is stored, and writes quantized
            ones as the float32 numbers that they stand for.
        calibrated: from `calibrate`: takes the place of the source's matrices, in float32.
        overwrite: replace a checkpoint that is there.
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
    # What is stored in another kind, such as quantized blocks, is read as float32.
    dtypes = {name: HF_WEIGHTS.get(kind, torch.float32) for name, kind in kinds.items()}
    changed = {} if calibrated is None else calibrated.tensors
    dtypes.update(dict.fromkeys(changed, torch.float32))
    n_bytes = {
        name: torch.Size(tensors.shape(name)).numel() * dtypes[name].itemsize for name in names
    }
    config = hf_config.config(source, Counter(dtypes.values()).most_common(1)[0][0])
    written, carried_over = 0, 0
    with new_folder(path, n_bytes=sum(n_bytes.values()), overwrite=overwrite) as folder:
        write_json(folder / "config.json", config)
        check_tensors(source, AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        settings = hf_config.generation_config(source, _roundings(weights, calibrated))
        write_json(folder / "generation_config.json", settings)
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
                if name in changed:
                    state[name] = changed[name]
                else:
                    tensor = row_order.read(source.files, name, "halves")
                    state[name] = cast(tensor, dtypes[name], name).contiguous()
                    carried_over += tensors.stored_as(name) == _STORED_AS[dtypes[name]]
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
        stored_as=dict(Counter(_STORED_AS[dtype] for dtype in dtypes.values())),
        carried_over=carried_over,
        nll_change=None if calibrated is None else calibrated.rounding.nll_change,
    )


def _roundings(weights: str | None, calibrated: Calibrated | None) -> dict[str, Rounding] | None:
    """What is known of the new numbers' 8 and 4 bits; None where the numbers are the source's."""
    if calibrated is not None:
        return {"int4": calibrated.rounding}
    return {} if weights in ("f16", "bf16") else None


def check_tensors(source: Source, config: Any) -> None:
    """Compare with the model that transformers makes of a config, before anything large is written.

    Raises:
        CheckpointError: transformers would miss a tensor, have no use for one, or expect another shape.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, **families.OWN_KERNELS
        )
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
