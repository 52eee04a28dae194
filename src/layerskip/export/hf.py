"""A plain transformers checkpoint: safetensors, config, tokenizer and generation settings."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip.export import hf_config, row_order
from layerskip.export.calibrate import Calibrated
from layerskip.export.destination import new_folder
from layerskip.export.source import Source
from layerskip.export.written import Progress, Written
from layerskip.model import CheckpointError
from layerskip.model.rounding import recorded

HF_WEIGHTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHARD_BYTES = 2_000_000_000  # what is in memory at a time
_STORED_AS = {"F16": torch.float16, "BF16": torch.bfloat16}  # every other kind is read as float32
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


def to_hf(
    source: Source,
    path: Path,
    *,
    weights: str | None = None,
    calibrated: Calibrated | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Written:
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
    if weights is not None and weights not in HF_WEIGHTS:
        raise ValueError(f"weights is {weights!r}; of an hf checkpoint: {', '.join(HF_WEIGHTS)}")
    tensors, names = source.files.tensors, source.names
    dtypes = {
        name: HF_WEIGHTS[weights]
        if weights
        else _STORED_AS.get(tensors.stored_as(name), torch.float32)
        for name in names
    }
    changed = {} if calibrated is None else calibrated.tensors
    dtypes.update(dict.fromkeys(changed, torch.float32))
    n_bytes = {
        name: torch.Size(tensors.shape(name)).numel() * dtypes[name].itemsize for name in names
    }
    config = hf_config.config(source, Counter(dtypes.values()).most_common(1)[0][0])
    written, carried_over = 0, 0
    with new_folder(path, n_bytes=sum(n_bytes.values()), overwrite=overwrite) as folder:
        (folder / "config.json").write_text(_json(config), encoding="utf-8")
        _check(folder, {name: tensors.shape(name) for name in names}, tied=source.files.tied)
        (folder / "generation_config.json").write_text(
            _json(_generation_config(source, weights, calibrated)), encoding="utf-8"
        )
        _write_tokenizer(source, folder)
        shards = list(_shards(n_bytes))
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
            state: dict[str, Tensor] = {}
            for name in shard:
                if name in changed:
                    state[name] = changed[name]
                else:
                    tensor = row_order.read(source, name, "halves")
                    state[name] = tensor.to(dtypes[name]).contiguous()
                    carried_over += tensors.stored_as(name) == _NAMES[dtypes[name]]
                written += 1
                progress(written, len(names))
            save_file(state, folder / file, metadata={"format": "pt"})
            (folder / file).chmod((folder / "config.json").stat().st_mode)
            weight_map.update(dict.fromkeys(shard, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(n_bytes.values())}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")
    return Written(
        path=path,
        format="hf" if source.exit_layer is None else "hf-draft",
        exit_layer=source.exit_layer,
        layers=source.architecture.n_layers,
        tied_head=source.files.tied,
        bytes=sum(file.stat().st_size for file in path.iterdir()),
        tensors=len(names),
        stored_as=dict(Counter(_NAMES[dtype] for dtype in dtypes.values())),
        carried_over=carried_over,
        nll_change=None if calibrated is None else calibrated.rounding.nll_change,
    )


def _generation_config(
    source: Source, weights: str | None, calibrated: Calibrated | None
) -> dict[str, Any]:
    """The source's; what it says of quantized weights does not hold for other numbers."""
    fields = hf_config.generation_config(source)
    if calibrated is not None or weights in ("f16", "bf16"):
        known = {} if calibrated is None else {"int4": calibrated.rounding}
        fields["layerskip"] = recorded(fields.get("layerskip"), known)
    return {key: value for key, value in fields.items() if key != "layerskip" or value}


def _shards(n_bytes: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, cut where a file would grow over `SHARD_BYTES`."""
    shard: list[str] = []
    size = 0
    for name, more in n_bytes.items():
        if shard and size + more > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += more
    yield shard


def _check(folder: Path, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare with the model that transformers makes of the config, before anything large is written.

    Raises:
        CheckpointError: transformers would miss a tensor, have no use for one, or expect another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"the tensor {name} is {shapes.get(name, 'missing')}, transformers expects"
                f" {expected.get(name, 'none')} in a {config.model_type} model"
            )


def _write_tokenizer(source: Source, folder: Path) -> None:
    """Copy the source's tokenizer files, or save the tokenizer of its GGUF file."""
    origin = source.files.path
    found = [name for name in _TOKENIZER_FILES if (origin / name).is_file()]
    for name in found:
        shutil.copyfile(origin / name, folder / name)
    if not found and (tokenizer := source.files.tokenizer()) is not None:
        tokenizer.save_pretrained(str(folder))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        fields = json.loads(settings.read_text(encoding="utf-8"))
        if fields.get("tokenizer_class") == "TokenizersBackend":
            # transformers 5 writes its own new name; both 4 and 5 know the older one.
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings.write_text(_json(fields), encoding="utf-8")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
