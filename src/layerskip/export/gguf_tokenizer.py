"""A transformers tokenizer as GGUF metadata: tokens, types, merges or scores, special tokens.

The `gguf` package reads tokenizer files too, but gives every token the same score and type, and leaves
the pre-tokenizer open. This module reads the loaded tokenizer, whatever files it came from.
"""

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import gguf
from gguf import TokenType

from layerskip.export.source import Source
from layerskip.model import UnsupportedModelError
from layerskip.model.tokenizer import ALL_MERGED, SPLITS, WHOLE_WORDS
from layerskip.model.weights import GgufFile

_STOP_TOKEN_FIELDS = ("eos", "eot", "eom")  # llama.cpp has three


class TokenizerWarning(UserWarning):
    """The GGUF file tokenizes some texts differently from its source."""


def add(writer: gguf.GGUFWriter, source: Source) -> None:
    """Add the tokenizer's metadata; that of a GGUF source has been copied with its other fields.

    Raises:
        UnsupportedModelError: llama.cpp has no such tokenizer, or no name for its pre-tokenizer.

    Warns:
        TokenizerWarning: GGUF has no field for when the tokenizer puts a space before a text.
    """
    if isinstance(source.files.tensors, GgufFile):
        return
    tokenizer = source.files.tokenizer()
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        _add_stop_tokens(writer, list(source.files.settings.end_tokens), first=None)
        return
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            "GGUF needs a tokenizer with a tokenizer.json; save it with transformers first"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"a {model['type']} tokenizer cannot be written to GGUF (byte-level and"
            " SentencePiece BPE can)"
        )
    tokens = _tokens(source, tokenizer)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, backend, tokens)
    else:
        _add_byte_level(writer, backend)
    _add_tokens(writer, tokens, tokenizer, backend)
    _add_special_tokens(writer, source, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_byte_level(writer: gguf.GGUFWriter, backend: dict[str, Any]) -> None:
    # llama.cpp has no NFC, and few texts have letters separate from their accents.
    _refuse_others(backend, "normalizer", lambda step: step["type"] == "NFC")
    if not _merges(backend):
        raise UnsupportedModelError("this tokenizer merges no bytes, which llama.cpp cannot read")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(backend))
    writer.add_token_merges(
        # A space inside a part would look like the one between the parts.
        [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in _merges(backend)]
    )


def _steps(backend: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, in order."""
    component = backend.get(part) or {}
    return component.get(f"{part.replace('_', '')}s", [component] if component else [])


def _refuse_others(
    backend: dict[str, Any], part: str, is_supported: Callable[[dict[str, Any]], bool]
) -> None:
    """Refuse a tokenizer with steps that llama.cpp does not have."""
    for step in _steps(backend, part):
        if not is_supported(step):
            raise UnsupportedModelError(
                f"this tokenizer's {part} has a step {step['type']}, which GGUF has no field for"
            )


def _pre_tokenizer_name(backend: dict[str, Any]) -> str:
    parts = _steps(backend, "pre_tokenizer")
    shape: tuple[str, ...] = ()
    if all(part["type"] != "ByteLevel" for part in parts):
        shape += ("no bytes",)
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
                shape += ("split", regex)
            case {"type": "Digits", "individual_digits": True}:
                shape += ("digits",)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                shape += ("bytes",)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass  # the steps before it split the text
            case _:
                shape += (str(part),)
    if shape not in SPLITS:
        raise UnsupportedModelError(
            "the way this tokenizer splits a text has no known name in llama.cpp; known are those"
            f" named {', '.join(SPLITS.values())}"
        )
    name = SPLITS[shape]
    keeps_words = bool(backend["model"].get("ignore_merges"))
    if keeps_words == (name in WHOLE_WORDS):
        return name
    for other, splits_like in ALL_MERGED.items():
        if splits_like == name:
            return other
    raise UnsupportedModelError(
        f"this tokenizer {'leaves' if keeps_words else 'merges'} words that are tokens,"
        f" llama.cpp's {name} does not; GGUF has no field for that"
    )


def _add_sentencepiece(writer: gguf.GGUFWriter, backend: dict[str, Any], tokens: list[str]) -> None:
    _refuse_others(backend, "normalizer", _is_of_sentencepiece)
    _refuse_others(backend, "pre_tokenizer", _is_of_sentencepiece)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_prefixes_a_space(backend))
    # llama.cpp merges the pair whose result has the highest score: the earlier a merge, the higher.
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(backend)):
        ranks.setdefault(left + right, rank)
    # One for each row, with or without a token: llama.cpp does not check their number.
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])


def _is_of_sentencepiece(step: dict[str, Any]) -> bool:
    """Return True for a step that SentencePiece has: it replaces spaces, or splits at them."""
    at_spaces = step.get("pattern") == {"String": " "}
    return step["type"] in ("Prepend", "Metaspace") or (
        step["type"] in ("Replace", "Split") and at_spaces
    )


def _prefixes_a_space(backend: dict[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(backend, "normalizer")):
        return True
    steps = _steps(backend, "pre_tokenizer")
    if all(step.get("prepend_scheme", "never") == "never" for step in steps):
        return False
    # Metaspace adds none before a space, and some only at the very beginning: GGUF has one flag.
    warnings.warn(
        "GGUF cannot say when this tokenizer puts a space before a text: by the file, a text that begins"
        " with a space or follows a special token may have other tokens (docs/how-to/export.md)",
        TokenizerWarning,
        stacklevel=5,  # the caller of `to_gguf`
    )
    return True


def _merges(backend: dict[str, Any]) -> list[list[str]]:
    merges = backend["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _tokens(source: Source, tokenizer: Any) -> list[str]:
    """A name for each row of the embedding."""
    n_tokens = source.architecture.vocab_size
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if names and max(names) >= n_tokens:
        raise UnsupportedModelError(
            f"the tokenizer has {max(names) + 1} tokens, the embedding {n_tokens}; GGUF needs a row"
            " for every token"
        )
    return [names.get(i, f"[PAD{i}]") for i in range(n_tokens)]


def _add_tokens(
    writer: gguf.GGUFWriter, tokens: list[str], tokenizer: Any, backend: dict[str, Any]
) -> None:
    added = {token["id"]: token for token in backend["added_tokens"]}
    vocab = tokenizer.get_vocab()
    types = []
    for i, token in enumerate(tokens):
        if i in added:
            types.append(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
        elif token not in vocab:
            types.append(TokenType.UNUSED)
        elif backend["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    unknown = tokenizer.unk_token_id
    if unknown is not None and backend["model"].get("byte_fallback"):
        types[unknown] = TokenType.UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def _add_special_tokens(writer: gguf.GGUFWriter, source: Source, tokenizer: Any) -> None:
    for name, token in [
        ("bos", tokenizer.bos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
    ]:
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    _add_stop_tokens(writer, list(source.files.settings.end_tokens), first=tokenizer.eos_token_id)
    without, with_special = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(with_special[0] == bos and without[0] != bos)
    writer.add_add_eos_token(with_special[-1] == eos and without[-1] != eos)


def _add_stop_tokens(writer: gguf.GGUFWriter, stop_tokens: list[int], first: int | None) -> None:
    """Add stop tokens, the tokenizer's EOS first if it is one of them or the only one."""
    if first is not None and (first in stop_tokens or not stop_tokens):
        stop_tokens = [first, *(token for token in stop_tokens if token != first)]
    for name, token in zip(_STOP_TOKEN_FIELDS, stop_tokens, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
