"""A transformers tokenizer in llama.cpp's words: tokens, types, merges or scores, special tokens.

The `gguf` package has readers of tokenizer files too, but they leave every score at one placeholder,
every token of a byte-level vocabulary at one type, and the pre-tokenizer open. What is read here is the
tokenizer itself, whatever files it came from.
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

_MORE_ENDS = ("eot", "eom")  # llama.cpp has three places for tokens that end an answer


class TokenizerWarning(UserWarning):
    """Some texts have other tokens by the file than by its source."""


def add(writer: gguf.GGUFWriter, source: Source) -> None:
    """Add the tokenizer's metadata; a GGUF source's own has been carried over with its other fields.

    Raises:
        UnsupportedModelError: llama.cpp has no such tokenizer, or no name for how it splits a text.

    Warns:
        TokenizerWarning: GGUF cannot say when it puts a space before a text.
    """
    if isinstance(source.files.tensors, GgufFile):
        return
    tokenizer = source.files.tokenizer()
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        _add_ends(writer, list(source.files.settings.end_tokens), first=None)
        return
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            "GGUF needs a tokenizer with a tokenizer.json; save it with transformers first"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"a {model['type']} tokenizer cannot be written to GGUF (byte-level and"
            " SentencePiece BPE can)"
        )
    tokens = _tokens(source, tokenizer)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, described, tokens)
    else:
        _add_byte_level(writer, described)
    _add_tokens(writer, tokens, tokenizer, described)
    _add_special_tokens(writer, source, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_byte_level(writer: gguf.GGUFWriter, described: dict[str, Any]) -> None:
    # llama.cpp has no NFC, and few texts have letters apart from their accents.
    _refuse_others(described, "normalizer", lambda step: step["type"] == "NFC")
    if not _merges(described):
        raise UnsupportedModelError("this tokenizer merges no bytes, which llama.cpp cannot read")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(described))
    writer.add_token_merges(
        # A space inside a part would look like the one between the parts.
        [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in _merges(described)]
    )


def _steps(described: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """What a normalizer or pre_tokenizer does, in turn."""
    found = described.get(part) or {}
    return found.get(f"{part.replace('_', '')}s", [found] if found else [])


def _refuse_others(
    described: dict[str, Any], part: str, is_known: Callable[[dict[str, Any]], bool]
) -> None:
    """Refuse a tokenizer that does more to a text than llama.cpp would."""
    for step in _steps(described, part):
        if not is_known(step):
            raise UnsupportedModelError(
                f"this tokenizer's {part} has a step {step['type']}, which GGUF cannot say"
            )


def _split_name(described: dict[str, Any]) -> str:
    parts = _steps(described, "pre_tokenizer")
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
                pass  # what is before it has split the text
            case _:
                shape += (str(part),)
    if shape not in SPLITS:
        raise UnsupportedModelError(
            "the way this tokenizer splits a text has no known name in llama.cpp; known are those"
            f" named {', '.join(SPLITS.values())}"
        )
    name = SPLITS[shape]
    is_whole = bool(described["model"].get("ignore_merges"))
    if is_whole == (name in WHOLE_WORDS):
        return name
    for other, splits_like in ALL_MERGED.items():
        if splits_like == name:
            return other
    raise UnsupportedModelError(
        f"this tokenizer {'leaves' if is_whole else 'merges'} words that are tokens, llama.cpp's {name}"
        " does not; GGUF cannot say that"
    )


def _add_sentencepiece(
    writer: gguf.GGUFWriter, described: dict[str, Any], tokens: list[str]
) -> None:
    _refuse_others(described, "normalizer", _is_of_sentencepiece)
    _refuse_others(described, "pre_tokenizer", _is_of_sentencepiece)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_prefixes_a_space(described))
    # llama.cpp merges the pair whose whole has the highest score: the earlier a merge, the higher.
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(described)):
        ranks.setdefault(left + right, rank)
    # One for each token, added ones and rows without a token too: llama.cpp does not look how many.
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])


def _is_of_sentencepiece(step: dict[str, Any]) -> bool:
    """Whether a step writes spaces as SentencePiece does, or splits at those left, of which none is."""
    at_spaces = step.get("pattern") == {"String": " "}
    return step["type"] in ("Prepend", "Metaspace") or (
        step["type"] in ("Replace", "Split") and at_spaces
    )


def _prefixes_a_space(described: dict[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(described, "normalizer")):
        return True
    steps = _steps(described, "pre_tokenizer")
    if all(step.get("prepend_scheme", "never") == "never" for step in steps):
        return False
    # Metaspace puts none before a space, and some only at the very beginning: GGUF has one bit.
    warnings.warn(
        "GGUF cannot say when this tokenizer puts a space before a text: by the file, a text that begins"
        " with a space or follows a special token may have other tokens (docs/export.md)",
        TokenizerWarning,
        stacklevel=5,  # whoever calls `to_gguf`
    )
    return True


def _merges(described: dict[str, Any]) -> list[list[str]]:
    merges = described["model"]["merges"]
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
    writer: gguf.GGUFWriter, tokens: list[str], tokenizer: Any, described: dict[str, Any]
) -> None:
    added = {token["id"]: token for token in described["added_tokens"]}
    known = tokenizer.get_vocab()
    types = []
    for i, token in enumerate(tokens):
        if i in added:
            types.append(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
        elif token not in known:
            types.append(TokenType.UNUSED)
        elif described["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    unknown = tokenizer.unk_token_id
    if unknown is not None and described["model"].get("byte_fallback"):
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
    ends = list(source.files.settings.end_tokens)
    _add_ends(writer, ends, first=tokenizer.eos_token_id)
    bare, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(whole[0] == begin and bare[0] != begin)
    writer.add_add_eos_token(whole[-1] == end and bare[-1] != end)


def _add_ends(writer: gguf.GGUFWriter, ends: list[int], first: int | None) -> None:
    """The tokenizer's own end token leads where the settings know it, or know none."""
    if first is not None and (first in ends or not ends):
        ends = [first, *(end for end in ends if end != first)]
    for name, token in zip(("eos", *_MORE_ENDS), ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
