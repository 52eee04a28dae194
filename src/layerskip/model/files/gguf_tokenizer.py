"""The tokenizer inside a GGUF file, built from its metadata as llama.cpp reads it.

What llama.cpp derives from a pre-tokenizer's name (how texts are split, whether a text begins with BOS,
whether words that are tokens are merged at all) is in a table here; other names are refused, since any
guess would give other tokens without a word.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.files.json_files import CheckpointError
from layerskip.model.files.weights import GgufFile

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
