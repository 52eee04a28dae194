"""The checkpoint's own tokenizer and chat template, through transformers.

What transformers before version 5, and programs that read its files, call some of their fields.

By the new names alone they would turn by a base of 10,000 and without scaling, and say nothing.
transformers 5 reads both as one.

The tokenizer inside a GGUF file, built from its metadata as llama.cpp reads it.

What llama.cpp derives from a pre-tokenizer's name (how texts are split, whether a text begins with BOS,
whether words that are tokens are merged at all) is in a table here; other names are refused, since any
guess would give other tokens without a word.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.fileio import CheckpointError, check_within, read_json, write_json
from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.weights import GgufFile

TEMPLATES = "additional_chat_templates"  # a folder: those with a name, each in a file
# Rotary base, and the part of a head that is turned.
_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_USUAL_NAMES = ("rope_theta", "partial_rotary_factor")


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `config.json` under their older names."""
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
    if "rope_theta" not in rope:  # none, or one for each kind of layer: there was no one word
        return {}
    for old, new in zip(_NAMES.get(family, _USUAL_NAMES), _USUAL_NAMES, strict=True):
        if new in rope:
            fields[old] = rope.pop(new)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return fields
    scaling = {"type": kind, **rope}  # once the name of rope_type
    if family == "phi3" and config.get("original_max_position_embeddings"):
        of_phi3 = {key: scaling.pop(key, None) for key in ("type", "short_factor", "long_factor")}
        # Version 4 wants these three alone; the last one stands beside them as well.
        if not scaling.keys() - {"rope_type", "original_max_position_embeddings"}:
            scaling = {}
        scaling = {**of_phi3, **scaling}
    return {**fields, "rope_scaling": scaling}


def amend_tokenizer_config(folder: Path) -> None:
    """Give the fields of a folder's `tokenizer_config.json` their older names, its templates included.

    Where templates have files of their own, transformers reads those.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    before = read_json(file)
    fields = {key: value for key, value in before.items() if key != "auto_map"}  # no code travels
    # A list there is transformers 5's, and so is the name below.
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := _older_chat_template(folder):
        fields["chat_template"] = template
    if fields != before:
        write_json(file, fields)


def _older_chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """The templates that have files of their own: one text, or several by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    texts = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


# Of `apply_chat_template` itself: they decide what is written and returned, not what the template sees.
_NO_VARIABLES = frozenset(
    [
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    ]
)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """The `tools` and `chat_template_kwargs` of a row, as `apply_chat_template` takes them.

    Args:
        row: both may be missing, or JSON, as tables have them.

    Raises:
        ValueError: one of them is of another kind, or a name is none of a variable.
    """
    tools, variables = (_read(row, name) for name in ("tools", "chat_template_kwargs"))
    if tools is not None and not (
        isinstance(tools, list)
        and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError("tools is to be a list of descriptions")
    if variables is not None and not isinstance(variables, Mapping):
        raise ValueError("chat_template_kwargs is to have names and values")
    if taken := _NO_VARIABLES & set(variables or ()):
        raise ValueError(f"chat_template_kwargs names {min(taken)}, no variable of a template")
    return {**(variables or {}), "tools": tools or None}


def _read(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error.msg}") from None


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The regular expression that splits a text, as it stands in tokenizer.json -> llama.cpp's name.
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
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is not merged, and BOS comes first
ALL_MERGED = {"smaug-bpe": "llama-bpe"}  # splits like the other, of which neither holds
# Tokens that end an answer and are no text, whatever else the file says of them, as in llama.cpp.
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
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}  # ours: the file's
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens
_LONGEST_MERGED = 1024  # characters; each cut of a token is looked up


def from_gguf(file: GgufFile) -> Any:
    """The tokenizer, of transformers' generic class; None where the file has none.

    Raises:
        UnsupportedModelError: it is of another kind, or splits texts in a way that is not known here.
        CheckpointError: its pieces do not fit together.
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
    named = {tokens[i] for i in end_tokens(file)}
    for token, type_ in zip(tokens, _field(file, "token_type", []), strict=False):
        is_end = token in _ENDS or (type_ == _USER_DEFINED and token in named)
        if type_ == _CONTROL or is_end:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    ids = {**special_token_ids(file), "unk_token_id": _token_id(file, "unknown", tokens)}
    special = {name.removesuffix("_id"): tokens[i] for name, i in ids.items() if i is not None}
    adds = {
        "bos_token": bool(_field(file, "add_bos_token", begins)),
        "eos_token": bool(_field(file, "add_eos_token", False)),
    }
    _begin_and_end(backend, {x: special[x] for x, added in adds.items() if added and x in special})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(file),
        **({"bos_token": None, "eos_token": None} | special),
    )


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The template, or several by name; names that could be no file's are passed over."""
    key = "tokenizer.chat_template"
    names = [name for name in file.field(f"{key}s", []) if re.fullmatch(r"\w+", name)]
    templates = {"default": file.field(key)} | {n: file.field(f"{key}.{n}") for n in names}
    known = {name: text for name, text in templates.items() if text is not None}
    return known if known.keys() - {"default"} else known.get("default")


def end_tokens(file: GgufFile) -> list[int]:
    """End of text, of turn, and of message, as far as the file names them, and tokens known for it."""
    tokens: list[str] = _field(file, "tokens", [])
    named = (_token_id(file, end, tokens) for end in ("eos", "eot", "eom"))
    known = (i for i, token in enumerate(tokens) if token in _ENDS)
    return list(dict.fromkeys(i for i in (*named, *known) if i is not None))


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """By the names of a model's configuration; an id that is no token's is left out, as in llama.cpp."""
    tokens: list[str] = _field(file, "tokens", [])
    ids = {name: _token_id(file, theirs, tokens) for name, theirs in _SPECIAL.items()}
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
    """Any two tokens whose whole is one may be merged, those with the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    types = _field(file, "token_type", [_NORMAL] * len(tokens))
    merges = []
    scores = _field(file, "scores", [0.0] * len(tokens))
    if not len(scores) == len(types) == len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(scores)} scores and {len(types)} types for {len(tokens)} tokens;"
            " convert or export it again"
        )
    scored = zip(tokens, scores, types, strict=True)
    for token, score, type_ in scored:
        if type_ == _NORMAL and len(token) <= _LONGEST_MERGED:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += [(score, parts) for parts in cuts if parts[0] in vocab and parts[1] in vocab]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(
        vocab,
        [parts for _, parts in merges],
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
    """Let every text have these tokens, "bos_token" and "eos_token", around it."""
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


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Classes without code of their own: nothing in the model's config changes what they do.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers would make any class of its own that is named, and call what it reads files with.
_KINDS = re.compile(
    r"(?!Auto|Rag)\w+Tokenizer(Fast)?|TokenizersBackend|PythonBackend|MistralCommonBackend"
)
# Classes that transformers 5 builds anew, without steps of tokenizer.json such as splitting digits.
_REBUILT = ("GPT2Tokenizer", "GPT2TokenizerFast")


def load(path: Path, gguf_file: GgufFile | None = None) -> Any:
    """The tokenizer whose files lie in a checkpoint folder, else the one inside the GGUF file.

    Returns:
        The tokenizer, or None where there is neither.

    Raises:
        CheckpointError: a tokenizer is there but cannot be read.
        UnsupportedModelError: it is of a kind that is not known here.
    """
    try:
        if any((path / name).is_file() for name in _TOKENIZER_FILES):

            def said_by(name: str) -> Mapping[str, Any]:
                return read_json(path / name) if (path / name).is_file() else {}

            return read(str(path), said_by, is_fast=(path / "tokenizer.json").is_file())
        return None if gguf_file is None else from_gguf(gguf_file)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:  # the reader in Rust knows no other kind
        raise CheckpointError(f"the tokenizer of {path} cannot be read: {error}") from error


def read(source: str, said_by: Callable[[str], Mapping[str, Any]], *, is_fast: bool) -> Any:
    """The tokenizer of a folder or hub id, by transformers; no code of a checkpoint runs.

    Args:
        source: the folder or hub id.
        said_by: from the name of one of its files to the JSON object in it, empty where there is none.
        is_fast: whether it has a tokenizer.json.

    Raises:
        CheckpointError: it names a class that is no tokenizer.
    """
    settings = said_by("tokenizer_config.json")
    if is_fast and is_as_written(settings):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
    for kind in (said.get("tokenizer_class") for said in (settings, said_by("config.json"))):
        if kind is not None and not _KINDS.fullmatch(str(kind)):
            raise CheckpointError(f"the tokenizer_class of {source} is {kind!r}, which is none")
    from transformers import AutoTokenizer  # which imports all of modelling

    with _no_questions():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Some classes forget that code is not to be trusted, and ask on the terminal: no is the answer."""
    from transformers import dynamic_module_utils as asking

    before, asking.TIME_OUT_REMOTE_CODE = asking.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        asking.TIME_OUT_REMOTE_CODE = before


def is_as_written(settings: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is what its tokenizer.json says, by its tokenizer_config.json."""
    kind = settings.get("tokenizer_class")
    is_complete = settings.get("eos_token") is not None  # the class would know one without that
    return "auto_map" not in settings and (kind in _GENERIC or (kind in _REBUILT and is_complete))


def write(path: Path, folder: Path, gguf_file: GgufFile | None = None) -> None:
    """Copy a checkpoint's tokenizer files into a folder, or save the tokenizer of its GGUF file there.

    Raises:
        CheckpointError, UnsupportedModelError: as of `load`; or a file lies outside the folder.
    """
    templates = sorted(path.glob(f"{TEMPLATES}/*.jinja"))
    names = (*_TOKENIZER_FILES, *_FILES_BESIDE, *(str(t.relative_to(path)) for t in templates))
    found = [name for name in names if (path / name).is_file()]
    if not set(found) & set(_TOKENIZER_FILES) and (tokenizer := load(path, gguf_file)) is not None:
        tokenizer.save_pretrained(str(folder))
    for name in found:
        # Another file of this machine is not to be passed on.
        check_within(path / name, path, is_read=True)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path / name, folder / name)
    amend_tokenizer_config(folder)
