"""Training rows, new models, and resumable training runs."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from common import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerskip.data.readers import hidden_bars
from layerskip.fileio import read_json
from layerskip.model.hub import BUILTIN_MODELS, PackagedModel
from layerskip.model.weights import SafetensorsFiles
from layerskip.recipe import RecipeConfig
from layerskip.training import Progress, TrainConfig, train
from layerskip.training.callbacks import read_log
from layerskip.training.checkpointing import last_checkpoint
from layerskip.training.data import Encoding

BEGIN, END = "<s>", "</s>"
TOKENS = "tokens.json"  # how many a run has learnt
LINE_EVERY_S = 30.0
# Of a smoke run: the shape of its model, and how little it learns.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BRIEF = {"steps": 2, "batch_size": 2, "length": 64, "most_bytes": 200_000, "precision": "float32"}


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokens_of(rows: Iterable[Mapping[str, str]], tokenizer: Any, max_length: int) -> int:
    """Count the tokens of one pass over the rows, without truncated tokens."""
    encoding = Encoding(tokenizer=tokenizer, max_length=max_length)
    return sum(min(len(encoding("row", row)["input_ids"]), max_length) for row in rows)


def new_model(
    folder: Path, texts: Sequence[str], vocab_size: int, shape: Mapping[str, Any], *, weights: bool
) -> Any:
    """A configuration, a byte-level BPE tokenizer made of the texts, and if wanted random weights.

    Returns:
        The tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=END
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    config.save_pretrained(folder)
    if weights:
        with hidden_bars():
            LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def parameters_of(folder: Path) -> int:
    """Weights of a checkpoint, shared ones counted once."""
    tensors = SafetensorsFiles(folder)
    return sum(math.prod(tensors.shape(name)) for name in tensors.names())


def shown(folder: Path) -> str:
    """A folder's name for a result: below the repository where it lies there."""
    here = folder.absolute()  # a link to another disk counts as what it is called
    return str(here.relative_to(ROOT) if here.is_relative_to(ROOT) else folder)


def version(model: str) -> str | None:
    """Return the checksum of a built-in model that changes between versions; None for others."""
    known = BUILTIN_MODELS.get(model)
    return known.sha256 if isinstance(known, PackagedModel) else None


def trained(config: TrainConfig, tokens_of_epoch: int, *, again: bool = False) -> dict[str, Any]:
    """Train, or go on, or leave a finished result as it is; say how long it learned.

    Args:
        config: with `resume` on.
        tokens_of_epoch: of one pass over its rows.
        again: begin anew.

    Raises:
        SystemExit: the folder holds a run with other settings.
    """
    output = Path(config.output)
    if again:
        shutil.rmtree(output, ignore_errors=True)
    if last_checkpoint(output) is None:
        config = replace(config, resume=False)
    record = output / "train.json"
    wanted = json.loads(json.dumps(config.as_flat_dict()))
    # Whether it goes on is no setting of what it learns: the first start says no, the next ones yes.
    if record.is_file() and read_json(record) | {"resume": config.resume} != wanted:
        raise SystemExit(f"{output} was trained with other settings; --again trains anew")
    if not (output / "model.safetensors").is_file():
        train(config, watch=_lines(output.name))
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # three times the model's size, and never needed again
        last = read_log(output / "train_log.jsonl")[-1]
        tokens = round(last["epoch"] * tokens_of_epoch)
        (output / TOKENS).write_text(json.dumps({"tokens": tokens}) + "\n")
    return told(output)


def told(folder: Path) -> dict[str, Any]:
    """Read totals from the files of a training run; {} without files.

    The number of tokens is known of runs of these experiments alone.
    """
    record, tokens = folder / "train.json", folder / TOKENS
    if not record.is_file():
        return {}
    settings = json.loads(record.read_text(encoding="utf-8"))
    steps = read_log(folder / "train_log.jsonl")[-1]["step"]
    return {
        "checkpoint": shown(folder),
        "steps": steps,
        "rows": steps * settings["batch_size"] * settings["accumulation"],
        **(json.loads(tokens.read_text(encoding="utf-8")) if tokens.is_file() else {}),
        "regime": settings["regime"],
        "learning_rate": settings["learning_rate"],
        "recipe": {field.name: settings[field.name] for field in fields(RecipeConfig)},
    }


def _lines(name: str) -> Any:
    """Something for `train` to tell its progress to: a line now and then."""
    begin = time.monotonic()
    told = begin

    def watch(progress: Progress) -> None:
        nonlocal told
        if "loss" in progress.logs and time.monotonic() - told > LINE_EVERY_S:
            told = time.monotonic()
            done = f"step {progress.step} of {progress.total_steps}"
            print(f"{name}: {done}, loss {progress.logs['loss']:.3f}", flush=True)

    return watch
