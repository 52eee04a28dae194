"""Checkpoint files to a decoder: safetensors as transformers saves them, and GGUF."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerskip.model import families, rotary
from layerskip.model.decoder import Decoder, Layer
from layerskip.model.families import FAMILIES, Architecture, Rope, UnsupportedModelError
from layerskip.model.linear import Linear, linear


class CheckpointError(ValueError):
    """Files that are missing, damaged or do not fit together; the message says which and what to do."""


class Tensors(Protocol):
    """Named tensors of a checkpoint under the names that transformers uses, read one at a time.

    `rotary_layout` says how the rows of Q and K are ordered (see `rotary.interleave`).
    """

    rotary_layout: str

    def names(self) -> set[str]:
        """All names that the checkpoint holds."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor in a floating dtype, on the CPU."""
        ...


class SafetensorsFiles:
    """One file or several with an index, memory-mapped."""

    rotary_layout = "halves"

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} names no files; fetch the checkpoint again")
            files = {str(file) for file in weight_map.values()}
        else:
            files = {"model.safetensors"}
        self._files = {}
        for file in sorted(files):
            path = folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
            with _damage_named(path):
                handle = safe_open(path, framework="pt")
                self._files.update(dict.fromkeys(handle.keys(), (handle, path)))

    def names(self) -> set[str]:
        """All names in all files."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        handle, path = self._files[name]
        with _damage_named(path):
            tensor: Tensor = handle.get_tensor(name)
        return tensor


class GgufFile:
    """A GGUF file; quantized tensors are read as the float32 numbers that they stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _damage_named(path):
            self._reader = gguf.GGUFReader(path)
        self._tensors = {_gguf_known_as(tensor.name): tensor for tensor in self._reader.tensors}
        family = families.family_of(str(self.field("general.architecture")))
        self.rotary_layout: str = FAMILIES[family].gguf_rotary

    def names(self) -> set[str]:
        """All names, in transformers' words."""
        return set(self._tensors) - {_ROPE_FACTORS}

    def read(self, name: str) -> Tensor:
        """One tensor as float32."""
        tensor = self._tensors[name]
        try:
            with _damage_named(self.path):
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UnsupportedModelError(
                f"{name} is stored as {kind}, which cannot be read"
            ) from error
        values = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(
            values.reshape(tuple(int(n) for n in reversed(tensor.shape))).copy()
        )

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value, or the default."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no field {key}; fetch or convert it again")
        return value

    def architecture(self) -> Architecture:
        """The architecture that the metadata describes."""
        name = str(self.field("general.architecture"))
        family = families.family_of(name)
        scaling = self.field(f"{name}.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise UnsupportedModelError(
                f"rotary scaling {scaling!r} in a GGUF file is not supported"
            )
        factors = self._tensors.get(_ROPE_FACTORS)
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise _missing("model.embed_tokens.weight")
        n_layers = int(self._required(f"{name}.block_count"))
        n_heads = int(self._required(f"{name}.attention.head_count"))
        hidden_size = int(self._required(f"{name}.embedding_length"))
        window = self.field(f"{name}.attention.sliding_window")
        return Architecture(
            family=family,
            n_layers=n_layers,
            hidden_size=hidden_size,
            n_heads=n_heads,
            n_kv_heads=int(self.field(f"{name}.attention.head_count_kv", n_heads)),
            head_dim=int(self.field(f"{name}.attention.key_length", hidden_size // n_heads)),
            ffn_size=int(self._required(f"{name}.feed_forward_length")),
            vocab_size=int(embedding.shape[-1]),
            norm_eps=float(self._required(f"{name}.attention.layer_norm_rms_epsilon")),
            max_context=int(self._required(f"{name}.context_length")),
            rope=Rope(
                theta=float(self.field(f"{name}.rope.freq_base", 10_000.0)),
                kind="default" if scaling == "none" else "linear",
                factor=float(self.field(f"{name}.rope.scaling.factor", 1.0)),
                frequency_factors=None if factors is None else tuple(factors.data.tolist()),
            ),
            sliding_windows=(int(window) if window else None,) * n_layers,
        )


_ROPE_FACTORS = "rope_freqs.weight"
_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _gguf_known_as(name: str) -> str:
    """What transformers calls a tensor of a GGUF file; its own name where there is no other."""
    part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if part is None:
        return _GGUF_NAMES.get(name, name)
    number, stem, kind = part.groups()
    return f"model.layers.{number}.{_GGUF_LAYER_NAMES.get(stem, stem)}.{kind}"


def build(
    architecture: Architecture, tensors: Tensors, *, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    """Read, cast, fuse and pack every weight, one layer at a time.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the architecture says.
        UnsupportedModelError: the checkpoint holds tensors that the decoder has no use for.
    """
    a = architecture
    take = _Taker(tensors, dtype, torch.device(device))
    embedding = take("model.embed_tokens.weight", (a.vocab_size, a.hidden_size))
    layers = [_layer(a, take, f"model.layers.{i}.") for i in range(a.n_layers)]
    final_norm = take("model.norm.weight", (a.hidden_size,))
    head = take.optional("lm_head.weight", embedding.shape)
    take.finish()
    return Decoder(
        a,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=linear(embedding if head is None else head),
    )


class _Taker:
    """Reads tensors, checks their shapes, and remembers which were used."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._names = tensors.names()
        self._unused = {n for n in self._names if not n.endswith("rotary_emb.inv_freq")}
        self._in_some_layer = {_without_number(n) for n in self._names}

    def optional(
        self, name: str, shape: tuple[int, ...], rotary_dim: int | None = None
    ) -> Tensor | None:
        """The tensor, or None where no layer has it.

        `rotary_dim` asks for the interleaved layout of heads of that size.
        """
        if name not in self._names:
            if _without_number(name) in self._in_some_layer:
                raise _missing(name)
            return None
        self._unused.discard(name)
        tensor = self._tensors.read(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(tensor.shape)}, the config says {shape}"
            )
        tensor = tensor.to(device=self._device, dtype=self._dtype)
        if rotary_dim is not None and self._tensors.rotary_layout == "halves":
            return rotary.interleave(tensor, rotary_dim)
        return tensor

    def __call__(self, name: str, shape: tuple[int, ...], rotary_dim: int | None = None) -> Tensor:
        tensor = self.optional(name, shape, rotary_dim)
        if tensor is None:
            raise _missing(name)
        return tensor

    def linear(self, n_in: int, *parts: tuple[str, int, int | None]) -> Linear:
        """Several projections of one input, fused: parts are (name, rows, rotary_dim)."""
        weights = [self(f"{name}.weight", (rows, n_in), dim) for name, rows, dim in parts]
        biases = [self.optional(f"{name}.bias", (rows,), dim) for name, rows, dim in parts]
        present = [bias for bias in biases if bias is not None]
        if len(present) not in (0, len(parts)):
            raise CheckpointError(f"only some of {[name for name, *_ in parts]} have a bias")
        return linear(torch.cat(weights), torch.cat(present) if present else None)

    def finish(self) -> None:
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            raise UnsupportedModelError(
                f"the checkpoint holds {len(self._unused)} tensors that its family does not use"
                f" ({some}); it needs a family of its own"
            )


def _without_number(name: str) -> str:
    return re.sub(r"^model\.layers\.\d+", "model.layers", name)


def _missing(name: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint has no tensor {name}; fetch or save it again")


def _layer(a: Architecture, take: _Taker, prefix: str) -> Layer:
    d, hd, ffn = a.hidden_size, a.head_dim, a.ffn_size
    q_rows, kv_rows = a.n_heads * hd, a.n_kv_heads * hd
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    q_norm, qk_norm = take.optional(f"{attention}q_norm.weight", (hd,), rotary_dim=hd), None
    if q_norm is not None:
        k_norm = take(f"{attention}k_norm.weight", (hd,), rotary_dim=hd)
        qk_norm = torch.cat([q_norm.expand(a.n_heads, hd), k_norm.expand(a.n_kv_heads, hd)])
    return Layer(
        attention_norm=take(f"{prefix}input_layernorm.weight", (d,)),
        qkv=take.linear(
            d,
            (f"{attention}q_proj", q_rows, hd),
            (f"{attention}k_proj", kv_rows, hd),
            (f"{attention}v_proj", kv_rows, None),
        ),
        qk_norm=qk_norm,
        attention_out=take.linear(q_rows, (f"{attention}o_proj", d, None)),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight", (d,)),
        gate_up=take.linear(d, (f"{mlp}gate_proj", ffn, None), (f"{mlp}up_proj", ffn, None)),
        down=take.linear(ffn, (f"{mlp}down_proj", d, None)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn a reader's own complaint into one that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}); fetch the checkpoint again"
        ) from error
