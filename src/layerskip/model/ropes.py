"""The rotary embeddings that a transformers config describes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from layerskip.model.architecture import Rope, UnsupportedModelError

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


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
    if kind in ("default", "dynamic"):  # alike up to the longest context that there is
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
    if kind == "yarn":
        return _yarn(plain, fields, config)
    if kind == "longrope":
        return _longrope(plain, fields, config["max_position_embeddings"])
    raise _unknown(kind)


def _yarn(plain: Rope, fields: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    """YaRN (arXiv 2309.00071, section 3.2): pairs that turn often stay as they are, slow ones are
    slowed down by `factor`, and those between are blended."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = plain.turned(int(config.get("head_dim") or hidden // heads))
    original = int(fields["original_max_position_embeddings"])
    factor = float(fields.get("factor") or config["max_position_embeddings"] / original)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(plain.theta))

    low = pair_that_turns(fields.get("beta_fast") or 32)
    high = pair_that_turns(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    slowed = [min(max((pair - low) / span, 0.0), 1.0) for pair in range(dim // 2)]
    magnitude = fields.get("attention_factor")
    if magnitude is None:
        one, other = fields.get("mscale"), fields.get("mscale_all_dim")
        scales = (one, other) if one and other else (1.0, 0.0)
        grown = [0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales]
        magnitude = grown[0] / grown[1]
    return dataclasses.replace(
        plain,
        frequency_factors=tuple(1.0 / (share / factor + 1.0 - share) for share in slowed),
        magnitude=float(magnitude),
    )


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
