"""Text and bytes of single tokens, for log probabilities."""

import functools
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the text of a token; its number where there is no tokenizer."""
    if tokenizer is None:
        return str(token_id)
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    symbol = _symbol(tokenizer, token_id)
    return f" {text}" if symbol.startswith(_SPACE) and not text.startswith(" ") else text


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes of a token, which may be a part of a character."""
    text = token_text(tokenizer, token_id)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    symbol = _symbol(tokenizer, token_id)
    if match := _BYTE.fullmatch(symbol):
        return bytes.fromhex(match[1])
    values = [_byte_of_letter().get(letter) for letter in symbol]
    return (
        text.encode() if None in values else bytes(value for value in values if value is not None)
    )


def _symbol(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id) or "")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (as in GPT-2).

    Printable bytes stand for themselves, the others, in their order, for the letters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
