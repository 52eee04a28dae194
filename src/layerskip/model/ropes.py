"""The rotary embeddings that a transformers config describes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from layerskip.model.architecture import Rope, UnsupportedModelError

_KINDS = ("default", "linear", "llama3", "longrope")


def ropes_of(config: Mapping[str, Any], n_layers: int) -> tuple[Rope | None, ...]:
    """One for all layers, one for each kind of layer (Gemma 3), or none in some (SmolLM3)."""
    fields = dict(config.get("rope_parameters") or {})
    by_kind = {kind: _rope(own, config) for kind, own in fields.items() if isinstance(own, Mapping)}
    if by_kind:
        return tuple(by_kind[kind] for kind in config["layer_types"])
    turns = config.get("no_rope_layers") or (True,) * n_layers  # 0 where a layer has none
    rope = _rope(fields, config)
    return tuple(rope if turn else None for turn in turns[:n_layers])


def check_ropes(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a config as it is stored names a scaling that is unknown here.

    Older ones have it under another name, and other words for LongRoPE in Phi-3.
    """
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for own in (fields, *(part for part in fields.values() if isinstance(part, Mapping))):
        kind = own.get("rope_type") or own.get("type") or "default"
        if kind not in _KINDS and config.get("model_type") != "phi3":
            raise _unknown(kind)


def _unknown(kind: object) -> UnsupportedModelError:
    known = f"{', '.join(_KINDS[:-1])} and {_KINDS[-1]}"
    return UnsupportedModelError(f"rotary scaling {kind!r} is not supported ({known} are)")


def _rope(fields: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    kind = fields.get("rope_type", "default")
    plain = Rope(
        theta=float(fields.get("rope_theta", 10_000.0)),
        fraction=float(fields.get("partial_rotary_factor", 1.0)),
    )
    if kind == "default":
        return plain
    if kind == "linear":
        return dataclasses.replace(plain, kind="linear", factor=float(fields["factor"]))
    if kind == "llama3":
        return dataclasses.replace(
            plain,
            kind="llama3",
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_positions=int(fields["original_max_position_embeddings"]),
        )
    if kind == "longrope":
        return _longrope(plain, fields, config["max_position_embeddings"])
    raise _unknown(kind)


def _longrope(plain: Rope, fields: Mapping[str, Any], max_positions: int) -> Rope:
    """LongRoPE (arXiv 2402.13753); the magnitude is its section 3.3 where the config names none."""
    original = int(fields["original_max_position_embeddings"])
    stretch = float(fields.get("factor") or max_positions / original)
    magnitude = fields.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + max(math.log(stretch), 0.0) / math.log(original))
    return dataclasses.replace(
        plain,
        original_max_positions=original,
        frequency_factors=tuple(map(float, fields["short_factor"])),
        long_factors=tuple(map(float, fields["long_factor"])),
        magnitude=float(magnitude),
    )
