"""Files of exit adapters: `exit_adapter.safetensors`, which drafts for one frozen model.

An exit adapter is a linear map of two hidden states to one, a decoder layer of the model's own family
and a final norm. Its tensors have the family's names, of layer 0; the projection and the draft
vocabulary have names of their own. The settings are JSON in the file's metadata. They bind the file to
its base by hashes of sizes and weights: states of another model would mean nothing to it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerskip.fileio import CheckpointError, check_within, parse_json
from layerskip.model import families
from layerskip.model.architecture import Architecture
from layerskip.model.checkpoint import ADAPTER_FILE, Files, open_files
from layerskip.model.decoder import Decoder
from layerskip.model.draft_rule import CONFIDENCE_BINS
from layerskip.model.linear import Linear
from layerskip.model.loader import build_adapter
from layerskip.model.quantize import STORED, Quantized
from layerskip.model.weights import damage_named

NO_ADAPTER = "none"
_VOCABULARY = "exit_adapter.draft_vocabulary"
_KEY = "layerskip"  # of the metadata
EPS = 1e-6  # of the normalization of the two states
_HASHED_ROWS = 512  # of a matrix, at even distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptanceCounts:
    """Drafted tokens by confidence, in bins of equal width from 0 to 1.

    Attributes:
        verified: tokens of each bin before which all drafted tokens were accepted.
        accepted: how many of them were accepted.
    """

    verified: tuple[int, ...]
    accepted: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = (*self.verified, *self.accepted)
        is_valid = (
            len(self.verified) == len(self.accepted) == CONFIDENCE_BINS
            and all(type(count) is int for count in counts)
            and all(0 <= a <= v for a, v in zip(self.accepted, self.verified, strict=True))
        )
        if not is_valid:
            raise ValueError("impossible counts of accepted tokens")

    @property
    def mean(self) -> float:
        """Share of accepted tokens; 0 where there is none."""
        return sum(self.accepted) / max(sum(self.verified), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Settings of an exit adapter.

    Attributes:
        exit_layer: E, 0 or more layers of the base that run for each drafted token.
        logit_scale: multiplies the logits, besides the base's own scale: one over the temperature.
        base: hashes of the model that it was trained for (see `hashes_of`).
        acceptance: of greedy drafts on held-out prompts; None in files that do not have it.
    """

    exit_layer: int
    logit_scale: float
    base: Mapping[str, str]
    acceptance: AcceptanceCounts | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitAdapterWeights:
    """An exit adapter as decoding uses it.

    Attributes:
        settings: of its file.
        decoder: the layer and the final norm, with the base's head.
        projection: [N, 2 D], two normalized hidden states side by side, to [N, D].
        draft_vocabulary: the tokens that it drafts besides those of the prompt.
    """

    settings: AdapterSettings
    decoder: Decoder
    projection: Linear
    draft_vocabulary: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes that one position reads, without the head."""
        return (
            self.decoder.weight_bytes
            - self.decoder.head.weight_bytes
            + self.projection.weight_bytes
        )


def normalized(hidden: Tensor) -> Tensor:
    """Scale hidden states [..., D] to a root mean square of 1, in float32."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:], None, EPS)


def joined(exit_states: Tensor, previous: Tensor) -> Tensor:
    """Return the inputs of the projection, [..., 2 D]: states of layer E, and of L one position back."""
    return torch.cat([normalized(exit_states), normalized(previous)], dim=-1)


class TensorDict:
    """Named tensors in memory, as `loader` reads them (see `weights.Tensors`)."""

    rotary_layout = "halves"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.paths: list[Path] = []
        self._tensors = tensors

    def names(self) -> set[str]:
        """See `Tensors`."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return tuple(self._tensors[name].shape)

    def stored_as(self, name: str) -> str:
        """See `Tensors`."""
        return {torch.float32: "F32", torch.float16: "F16"}.get(self._tensors[name].dtype, "BF16")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `Tensors`; gradients flow through it."""
        return self._tensors[name].to(dtype or self._tensors[name].dtype)

    def quantized(self, name: str) -> Quantized | None:
        """Return None: all tensors here are floating."""
        return None

    def release(self) -> None:
        """Do nothing: the tensors are in memory."""


def adapter_architecture(base: Architecture, logit_scale: float = 1.0) -> Architecture:
    """Return the architecture of an adapter's layer: the base's last kind that has positions.

    A mixture of experts becomes one MLP of the family's kind.
    """
    index = max(
        (i for i, rope in enumerate(base.ropes) if rope is not None), default=base.n_layers - 1
    )
    return dataclasses.replace(
        base,
        n_layers=1,
        sliding_windows=(base.sliding_windows[index],),
        ropes=(base.ropes[index],),
        mixture=None,
        logit_scale=base.logit_scale * logit_scale,
    )


def hashes_of(files: Files) -> dict[str, str]:
    """Return hashes of a model's sizes, and of some rows of its embedding and its last layer."""
    a = files.architecture
    names = families.FAMILIES[a.family].names
    sizes = (a.family, a.n_layers, a.hidden_size, a.n_heads, a.n_kv_heads, a.head_dim)
    numbers = json.dumps([*sizes, a.ffn_size, a.vocab_size]).encode()
    last = names.layer.format(a.n_layers - 1) + names.attention_out

    def rows(name: str) -> bytes:
        weight = files.tensors.read(f"{name}.weight")
        return weight[:: max(1, len(weight) // _HASHED_ROWS)].float().numpy().tobytes()

    parts = {"config": numbers, "embedding": rows(names.embedding), "last_layer": rows(last)}
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def save_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: AdapterSettings,
    draft_vocabulary: tuple[int, ...],
) -> None:
    """Write an adapter's file atomically, in bfloat16."""
    stored = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    stored[_VOCABULARY] = torch.tensor(draft_vocabulary, dtype=torch.int32)
    temporary = path.with_name(f".{path.name}")
    metadata = {"format": "pt", _KEY: json.dumps(dataclasses.asdict(settings))}
    save_file(stored, temporary, metadata)
    temporary.replace(path)


def find_adapter(checkpoint: Path, named: Path | None = None) -> Path | None:
    """Return the file of the adapter to use: one that is named, else one beside the checkpoint.

    Args:
        checkpoint: the folder or GGUF file of the base.
        named: an adapter's file or its folder.

    Raises:
        CheckpointError: there is none where one is named.
    """
    if named is None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        file = folder / ADAPTER_FILE
        if not file.is_file():
            return None
        check_within(file, is_read=True)
        return file
    file = named / ADAPTER_FILE if named.is_dir() else named
    if not file.is_file():
        raise CheckpointError(f"{named} holds no {ADAPTER_FILE}: train one with layerskip adapt")
    return file


def read_adapter(path: Path) -> tuple[dict[str, Tensor], AdapterSettings, tuple[int, ...]]:
    """Return the tensors, settings and draft vocabulary of an adapter's file.

    Raises:
        CheckpointError: the file is damaged, or no adapter.
    """
    with damage_named(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata() or {}
    settings = _settings(path, metadata)
    vocabulary = tensors.pop(_VOCABULARY, None)
    if vocabulary is None or vocabulary.ndim != 1 or not len(vocabulary):
        raise CheckpointError(f"{path} has no draft vocabulary; train the adapter again")
    return tensors, settings, tuple(vocabulary.tolist())


def load_adapter(path: Path, base: Decoder, checkpoint: Path) -> ExitAdapterWeights:
    """Read an adapter for a loaded model.

    Args:
        path: its file.
        base: the model.
        checkpoint: the model's folder or file, whose hashes have to be those of the adapter's base.

    Raises:
        CheckpointError: the file is damaged, or for another model.
    """
    tensors, settings, ids = read_adapter(path)
    _check_base(path, settings, checkpoint)
    a = base.architecture
    if not (0 <= min(ids) <= max(ids) < a.vocab_size and 0 <= settings.exit_layer < a.n_layers):
        raise CheckpointError(f"{path} is damaged: its settings do not fit its base")
    compiled = base.kernels == "compiled"
    # Drafts need not be exact: where int8 is fast, half the bytes are worth more than the last bits.
    in_int8 = base.weights == STORED or (compiled and base.weights == "16bit")
    decoder, projection = build_adapter(
        base,
        adapter_architecture(a, settings.logit_scale),
        TensorDict(tensors),
        dtype=base.dtype,
        weights="int8" if in_int8 else base.weights,
        compiled=compiled,
    )
    return ExitAdapterWeights(
        settings=settings, decoder=decoder, projection=projection, draft_vocabulary=ids
    )


def _settings(path: Path, metadata: Mapping[str, str]) -> AdapterSettings:
    try:
        fields: dict[str, Any] = parse_json(metadata[_KEY])
        counts = fields.pop("acceptance", None)
        acceptance = counts and AcceptanceCounts(**{n: tuple(c) for n, c in counts.items()})
        settings = AdapterSettings(**fields, acceptance=acceptance)
        is_valid = type(settings.exit_layer) is int and 0 < float(settings.logit_scale) < 1e6
        if not (is_valid and isinstance(settings.base, dict)):
            raise ValueError("impossible values")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no exit adapter: its settings cannot be read ({error})"
        ) from None
    return settings


def _check_base(path: Path, settings: AdapterSettings, checkpoint: Path) -> None:
    hashes = hashes_of(open_files(checkpoint))
    for part, name in (("config", "sizes"), ("embedding", "embedding"), ("last_layer", "weights")):
        if settings.base.get(part) != hashes[part]:
            raise CheckpointError(
                f"{path} is an exit adapter of another model than {checkpoint} (its {name} differ);"
                " train one for this model with layerskip adapt"
            )
