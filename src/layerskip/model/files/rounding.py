"""What is known of a checkpoint's quality in 8 and 4 bits, and what to say where that is little.

It stands in `generation_config.json`, key `layerskip`, field `weights`: {"int4": {"method": ...,
"nll_change": ...}}. Measuring takes the model in 16 bits too, so it is done where the checkpoint is
written, and loading only reads what was found.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip.model.files.json_files import read_json
from layerskip.model.files.settings import FILE, KEY
from layerskip.model.files.weights import Tensors

CALIBRATED = "calibration"
FIELD = "weights"
MOST_CHANGE = 0.05  # of the negative log-likelihood; above it a load says so
_FOUR_BITS = ("Q4_0", "Q4_1")  # which loading takes over


class RoundingWarning(UserWarning):
    """Loading in 8 or 4 bits costs quality, or may."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a checkpoint came to its rounded weights, and what they cost.

    Attributes:
        method: `CALIBRATED`.
        nll_change: of the calibration text's held-out part, against the same weights in bfloat16,
            0.02 = 2% more; None where it was not measured.
    """

    method: str
    nll_change: float | None = None


def recorded(own: Any, known: Mapping[str, Rounding]) -> dict[str, Any]:
    """The `layerskip` object of `generation_config.json` with what is known now, and nothing older.

    Args:
        own: the object so far, if there is one.
        known: "int8" or "int4" to what is known of it.
    """
    rest = {k: v for k, v in own.items() if k != FIELD} if isinstance(own, dict) else {}
    if known:
        rest[FIELD] = {name: dataclasses.asdict(rounding) for name, rounding in known.items()}
    return rest


def warn_of_rounding(path: Path, tensors: Tensors, weights: str) -> None:
    """Warn (`RoundingWarning`) of what is known, or not known, of a checkpoint in these bits.

    Eight bits that nobody measured are not doubted, since rounding to them is harmless; nor are four
    where every matrix of the layers is stored in them, as in some GGUF files, since nothing is rounded.

    Args:
        path: a checkpoint.
        tensors: what it holds.
        weights: a key of `quantize.WEIGHTS`.
    """
    if weights == "16bit" or (weights == "int4" and _is_in_four_bits(tensors)):
        return
    line = _doubt(path / FILE, weights)
    if line is not None:
        warnings.warn(line, RoundingWarning, stacklevel=4)  # whoever loads a `LayerSkipModel`


def _is_in_four_bits(tensors: Tensors) -> bool:
    matrices = [n for n in tensors.names() if ".layers." in n and len(tensors.shape(n)) == 2]
    return all(tensors.stored_as(name) in _FOUR_BITS for name in matrices)


def _doubt(file: Path, weights: str) -> str | None:
    own = read_json(file).get(KEY) if file.is_file() else None
    known = own.get(FIELD) if isinstance(own, dict) else None
    found = known.get(weights) if isinstance(known, dict) else None
    if not isinstance(found, dict):
        if weights == "int8":
            return None
        return (
            "what 4 bits cost this checkpoint is not known, and may be much; `layerskip export --to hf"
            " --weights int4 --calibrate TEXT` measures it and makes it less"
        )
    change = found.get("nll_change")
    if isinstance(change, float) and not change <= MOST_CHANGE:  # nor is it, where it is no number
        return (
            f"{weights} costs this checkpoint {change:.0%} negative log-likelihood on the text that it"
            " was measured with; --weights int8 costs less"
        )
    return None
