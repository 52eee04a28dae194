"""The checkpoint's own tokenizer, through transformers.

A tokenizer comes from the files in the checkpoint's folder, else from the metadata of its GGUF file,
read as llama.cpp does. `of_config` and `amend_tokenizer_config` write a folder's settings for
transformers 4 and for programs that read its files: by the new names alone they would rotate with a
base of 10,000 and without scaling, without any error. transformers 5 reads both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from layerskip.fileio import CheckpointError, check_within, read_json, write_json
from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.weights import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATES = "additional_chat_templates"  # a folder of named chat templates, one in each file
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Classes without code of their own: nothing in the model's config changes their result.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers would create any class of its own that is named, and call its methods for reading files.
_TOKENIZER_CLASS = re.compile(
    r"(?!Auto|Rag)\w+Tokenizer(Fast)?|TokenizersBackend|PythonBackend|MistralCommonBackend"
)
# Classes that transformers 5 rebuilds without steps of tokenizer.json such as splitting digits.
_REBUILT = ("GPT2Tokenizer", "GPT2TokenizerFast")


def load(path: Path, gguf_file: GgufFile | None = None) -> Any:
    """Load the tokenizer of a checkpoint folder, else that inside the GGUF file.

    Returns:
        The tokenizer, or None if there is neither.

    Raises:
        CheckpointError: a tokenizer is there but cannot be read.
        UnsupportedModelError: it is of an unknown kind.
    """
    try:
        if any((path / name).is_file() for name in _TOKENIZER_FILES):

            def read_file(name: str) -> Mapping[str, Any]:
                return read_json(path / name) if (path / name).is_file() else {}

            is_fast = (path / "tokenizer.json").is_file()
            if not is_fast and (path / "tokenizer.model").is_file():
                check_sentencepiece(path)
            return read(str(path), read_file, is_fast=is_fast)
        return None if gguf_file is None else from_gguf(gguf_file)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:  # the reader in Rust raises no other class
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer of {path} cannot be read: {reason}") from error


def check_sentencepiece(path: Path) -> None:
    """Raise CheckpointError where a folder's tokenizer.model cannot be read for want of a package."""
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [name for name, module in packages.items() if not _is_installed(module)]
    if missing:
        raise CheckpointError(
            f"{path} has its tokenizer in tokenizer.model alone, which needs {' and '.join(missing)};"
            f" run: pip install {' '.join(missing)}"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def read(source: str, read_file: Callable[[str], Mapping[str, Any]], *, is_fast: bool) -> Any:
    """Read the tokenizer of a folder or hub id with transformers; no code of a checkpoint runs.

    Args:
        source: the folder or hub id.
        read_file: returns the JSON object in one of its files, empty if the file does not exist.
        is_fast: it has a tokenizer.json.

    Raises:
        CheckpointError: it names a class that is no tokenizer.
    """
    settings = read_file("tokenizer_config.json")
    if is_fast and is_as_written(settings):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
    for name in (fields.get("tokenizer_class") for fields in (settings, read_file("config.json"))):
        if name is not None and not _TOKENIZER_CLASS.fullmatch(str(name)):
            raise CheckpointError(f"the tokenizer_class of {source} is {name!r}, which is none")
    from transformers import AutoTokenizer  # imports all models

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from logging warnings about a checkpoint, and from asking questions.

    Some of its classes ignore that code is not to be trusted, and ask on the terminal: a timeout of 0 is
    a no.
    """
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    timeout, verbosity = dynamic_module_utils.TIME_OUT_REMOTE_CODE, logging.get_verbosity()
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    logging.set_verbosity_error()
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = timeout
        logging.set_verbosity(verbosity)


def is_as_written(settings: Mapping[str, Any]) -> bool:
    """Return True if tokenizer.json is the whole tokenizer, by its tokenizer_config.json."""
    name = settings.get("tokenizer_class")
    is_complete = settings.get("eos_token") is not None  # the class would have a default
    return "auto_map" not in settings and (name in _GENERIC or (name in _REBUILT and is_complete))


def write(path: Path, folder: Path, gguf_file: GgufFile | None = None) -> None:
    """Copy a checkpoint's tokenizer files into a folder, or save the tokenizer of its GGUF file there.

    Raises:
        CheckpointError, UnsupportedModelError: see `load`; or a file is a link out of the folder.
    """
    templates = sorted(path.glob(f"{TEMPLATES}/*.jinja"))
    names = (*_TOKENIZER_FILES, *_FILES_BESIDE, *(str(t.relative_to(path)) for t in templates))
    present = [name for name in names if (path / name).is_file()]
    has_files = bool(set(present) & set(_TOKENIZER_FILES))
    if not has_files and (tokenizer := load(path, gguf_file)) is not None:
        tokenizer.save_pretrained(str(folder))
    for name in present:
        check_within(path / name, path, is_read=True)  # no other file of this machine is copied
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path / name, folder / name)
    amend_tokenizer_config(folder)


# --- settings for transformers 4

# Fields of the rotary base and of the rotated part of a head.
_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_USUAL_NAMES = ("rope_theta", "partial_rotary_factor")


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a `config.json` under transformers 4's names."""
    fields = _of_rope(config)
    if dtype := config.get("dtype"):
        fields["torch_dtype"] = dtype
    return fields


def _of_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    family, rope = str(config.get("model_type")), dict(config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if family.startswith("gemma3") and {"sliding_attention", "full_attention"} <= rope.keys():
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if "rope_theta" not in rope:  # no rotary embedding, or one for each kind of layer
        return {}
    for old, new in zip(_NAMES.get(family, _USUAL_NAMES), _USUAL_NAMES, strict=True):
        if new in rope:
            fields[old] = rope.pop(new)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return fields
    scaling = {"type": kind, **rope}  # the older name of rope_type
    if family == "phi3" and config.get("original_max_position_embeddings"):
        of_phi3 = {key: scaling.pop(key, None) for key in ("type", "short_factor", "long_factor")}
        # Version 4 accepts these three alone; the last one is also beside them.
        if not scaling.keys() - {"rope_type", "original_max_position_embeddings"}:
            scaling = {}
        scaling = {**of_phi3, **scaling}
    return {**fields, "rope_scaling": scaling}


def amend_tokenizer_config(folder: Path) -> None:
    """Add transformers 4's fields to a folder's `tokenizer_config.json`, chat templates included.

    transformers 5 reads templates from files of their own instead, if there are any.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    before = read_json(file)
    fields = {key: value for key, value in before.items() if key != "auto_map"}  # no code is copied
    # transformers 5 writes a list here, and the class name below.
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := _template_field(folder):
        fields["chat_template"] = template
    if fields != before:
        write_json(file, fields)


def _template_field(folder: Path) -> str | list[dict[str, str]] | None:
    """Return the chat templates in files: one text, or several by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    texts = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


# --- tokenizers in GGUF files

# llama.cpp derives from a pre-tokenizer's name how texts are split, whether BOS comes first, and whether
# words that are tokens are merged. Unknown names are refused, since any guess would give other tokens.

# The regular expression that splits a text, as in tokenizer.json -> llama.cpp's name.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("split", _WORDS % r"\p{N}{1,3}"): "llama-bpe",
    ("split", _WORDS % r"\p{N}"): "qwen2",
    ("split", _TEKKEN): "tekken",
    ("digits", "bytes"): "smollm",
    ("bytes",): "gpt-2",
}
_OTHER_NAMES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # words that are tokens are not merged; BOS comes first
ALL_MERGED = {"smaug-bpe": "llama-bpe"}  # splits like the other, without both of these
# Tokens that end an output and are no text, whatever their type in the file, as in llama.cpp.
_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
    ]
)
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}  # transformers' name: GGUF's
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens
_MAX_MERGED = 1024  # characters; each split of a longer token would be looked up


def from_gguf(file: GgufFile) -> Any:
    """Build the tokenizer, of transformers' generic class; None if the file has none.

    Raises:
        UnsupportedModelError: it is of another kind, or splits texts in an unknown way.
        CheckpointError: its parts are inconsistent.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind = str(_field(file, "model", "none"))
    if kind == "none":
        return None
    tokens: list[str] = _field(file, "tokens", [])
    name = str(_field(file, "pre", "default"))
    split = _OTHER_NAMES.get(name, name)
    is_whole, split = split in WHOLE_WORDS, ALL_MERGED.get(split, split)
    if kind == "llama":
        backend, begins = _sentencepiece(file, tokens), True
    elif kind == "gpt2" and split in SPLITS.values():
        backend, begins = _byte_level(file, tokens, split, is_whole), is_whole
    else:
        what = f"that splits texts as {name}" if kind == "gpt2" else f"of the kind {kind}"
        raise UnsupportedModelError(
            f"{file.path} has a tokenizer {what}, which is not read from GGUF; take the checkpoint in"
            " safetensors, or put its tokenizer.json beside the file and name the folder"
        )
    end_names = {tokens[i] for i in end_tokens(file)}
    added = []
    for token, type_ in zip(tokens, _field(file, "token_type", []), strict=False):
        is_end = token in _ENDS or (type_ == _USER_DEFINED and token in end_names)
        if is_end or type_ in (_CONTROL, _USER_DEFINED):
            is_special = is_end or type_ == _CONTROL
            added.append(AddedToken(token, normalized=False, special=is_special))
    backend.add_tokens(added)  # in one call: each one goes through all added tokens
    ids = {**special_token_ids(file), "unk_token_id": _token_id(file, "unknown", tokens)}
    special = {name.removesuffix("_id"): tokens[i] for name, i in ids.items() if i is not None}
    adds = {
        "bos_token": bool(_field(file, "add_bos_token", begins)),
        "eos_token": bool(_field(file, "add_eos_token", False)),
    }
    _begin_and_end(backend, {x: special[x] for x, added in adds.items() if added and x in special})
    return PreTrainedTokenizerFast(
        tokenizer_object=_Uncopied(backend),
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(file),
        **({"bos_token": None, "eos_token": None} | special),
    )


class _Uncopied(NamedTuple):
    """A new tokenizer, which transformers would copy by way of its JSON text."""

    backend: Tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self.backend


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """Return the template, or several by name; names that no file can have are left out."""
    key = "tokenizer.chat_template"
    names = [name for name in file.field(f"{key}s", []) if re.fullmatch(r"\w+", name)]
    templates = {"default": file.field(key)} | {n: file.field(f"{key}.{n}") for n in names}
    present = {name: text for name, text in templates.items() if text is not None}
    return present if present.keys() - {"default"} else present.get("default")


def end_tokens(file: GgufFile) -> list[int]:
    """Return the ids of the ends of text, turn and message in the file, and of well-known end tokens."""
    tokens: list[str] = _field(file, "tokens", [])
    declared = (_token_id(file, end, tokens) for end in ("eos", "eot", "eom"))
    well_known = (i for i, token in enumerate(tokens) if token in _ENDS)
    return list(dict.fromkeys(i for i in (*declared, *well_known) if i is not None))


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """Return special tokens under a config's names; invalid ids are left out, as in llama.cpp."""
    tokens: list[str] = _field(file, "tokens", [])
    ids = {name: _token_id(file, in_gguf, tokens) for name, in_gguf in _SPECIAL.items()}
    return {f"{name}_token_id": i for name, i in ids.items() if i is not None}


def _token_id(file: GgufFile, name: str, tokens: list[str]) -> int | None:
    number = _field(file, f"{name}_token_id")
    is_one = number is not None and int(number) >= 0 and (not tokens or int(number) < len(tokens))
    return int(number) if is_one else None


def _field(file: GgufFile, name: str, default: Any = None) -> Any:
    return file.field(f"tokenizer.ggml.{name}", default)


def _byte_level(file: GgufFile, tokens: list[str], split: str, is_whole: bool) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for merge in _field(file, "merges", []):
        space = merge.index(" ", 1)
        merges.append((merge[:space], merge[space + 1 :]))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=is_whole))
    shape = next(shape for shape, name in SPLITS.items() if name == split)
    steps: list[Any] = []
    if shape[0] == "split":
        steps.append(pre_tokenizers.Split(Regex(shape[1]), "isolated"))
    if shape[0] == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    words = shape[0] != "split"  # else they are split already
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Build a BPE: tokens merge if their concatenation is a token, that with the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    types = _field(file, "token_type", [_NORMAL] * len(tokens))
    scores = _field(file, "scores", [0.0] * len(tokens))
    if not len(scores) == len(types) == len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(scores)} scores and {len(types)} types for {len(tokens)} tokens;"
            " convert or export it again"
        )
    merges = [
        (token[:i], token[i:])
        for _, token, type_ in sorted(zip(scores, tokens, types, strict=True), key=lambda x: -x[0])
        if type_ == _NORMAL and len(token) <= _MAX_MERGED
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    model = models.BPE(
        vocab,
        merges,
        unk_token=tokens[_token_id(file, "unknown", tokens) or 0],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if bool(_field(file, "add_space_prefix", True)):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _begin_and_end(backend: Tokenizer, added: dict[str, str]) -> None:
    """Add these tokens, "bos_token" and "eos_token", around every text."""
    from tokenizers.processors import TemplateProcessing

    if not added:
        return
    one = [added.get("bos_token"), "$A", added.get("eos_token")]
    single = [part for part in one if part]
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part}:1".replace("$A", "$B") for part in single)],
        special_tokens=[(name, backend.token_to_id(name)) for name in added.values()],
    )
