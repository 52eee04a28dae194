"""`Decoder` with its layers run by the compiled kernels: hidden states in float32, on the CPU."""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerskip.model.architecture import Architecture
from layerskip.model.decoder import MLP, Decoder, HeadNorm, Layer, RMSNorm
from layerskip.model.draft_rule import DraftRule
from layerskip.model.families import FAMILIES
from layerskip.model.kv_cache import KVCache, slot_width
from layerskip.model.linear import Matrix
from layerskip.model.native.build import library
from layerskip.model.native.packed import (
    FLOATS,
    KINDS,
    LANES,
    LinearStruct,
    PackedEmbedding,
    PackedLinear,
    PackedMatrix,
    choose,
    fits,
    pointers_to,
    readable,
)
from layerskip.model.native.team_size import team_size


class LayerStruct(ctypes.Structure):
    """`Layer` of `kernels.cpp`."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("attention_post_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp_post_norm", ctypes.c_void_p),
        ("qk_norm", ctypes.c_void_p),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
        ("qkv", LinearStruct),
        ("attention_out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
    )


class ModelStruct(ctypes.Structure):
    """`Model` of `kernels.cpp`."""

    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("ffn", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("cache_kind", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("layers", ctypes.c_void_p),
    )


class SequenceStruct(ctypes.Structure):
    """`Sequence` of `kernels.cpp`; the kernels set the last three."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("turns", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("partial", ctypes.c_void_p),
    )


class RuleStruct(ctypes.Structure):
    """`Rule` of `kernels.cpp`, which sets the last two."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("rate", "mean", "head", "overhead", "survival")),
        *((name, ctypes.c_void_p) for name in ("acceptance", "costs", "ends")),
        *((name, ctypes.c_int64) for name in ("n_bins", "n_ends", "limit", "lookahead")),
        ("scored", ctypes.c_int64),
        ("kept", ctypes.c_int64),
    )


class NativeLayer:
    """One layer's parts as the kernels read them, norms in float32."""

    def __init__(self, layer: Layer) -> None:
        norms = (
            layer.attention_norm,
            layer.attention_post_norm,
            layer.mlp_norm,
            layer.mlp_post_norm,
            layer.qk_norm,
        )
        self._weights = [None if norm is None else weight_of(norm) for norm in norms]
        assert isinstance(layer.mlp, MLP)
        assert layer.mlp.is_gated
        products = (layer.qkv, layer.attention_out, layer.mlp.gate_up, layer.mlp.down)
        self._products = [p for p in products if isinstance(p, PackedMatrix | PackedLinear)]

    def struct(self, window: int, rope: int) -> LayerStruct:
        """Return pointers to the layer's parts, valid as long as this object lives."""
        pointers = [None if w is None else w.data_ptr() for w in self._weights]
        return LayerStruct(*pointers, window, rope, *(product.struct for product in self._products))


def weight_of(norm: object) -> Tensor:
    """Return a norm's weights as the kernels read them."""
    assert isinstance(norm, RMSNorm | HeadNorm)
    return norm.weight.float().contiguous()


_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_CACHE_KINDS = {**KINDS, torch.int8: 8}
_WIDEST_HEAD = 1024
_MAX_TABLES = 63  # pointers to rotary factors, of as many capacities


def supports(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels support every part of this architecture."""
    a, family = architecture, FAMILIES[architecture.family]
    widths = (a.hidden_size, a.ffn_size, a.n_heads * a.head_dim)
    return (
        device.type == "cpu"
        and dtype in KINDS
        and family.is_gated
        and family.qk_norm != "projection"
        and a.activation in _ACTIVATIONS
        and a.mixture is None
        and a.attention_cap is None
        and not a.parallel_residual
        and all(fits(width) for width in widths)
        and a.head_dim % LANES == 0
        and a.head_dim <= _WIDEST_HEAD
    )


class GreedyDraft(NamedTuple):
    """Tokens drafted by `NativeDecoder.greedy_draft`.

    Attributes:
        hidden: states [1, T + n, D] that left layer E, of the T tokens before and of the n kept ones.
        tokens: [1, n or n + 1] int64; of n + 1 the last one was proposed and not kept.
        confidences: their probabilities.
        n_kept: n.
    """

    hidden: Tensor
    tokens: Tensor
    confidences: list[float]
    n_kept: int


class NativeDecoder(Decoder):
    """A decoder whose layers are one call of compiled kernels, with batch-invariant results.

    Bits do not depend on the number of positions in a pass. Its parts are `PackedMatrix` and RMS norms
    (see `supports`); hidden states and logits are float32. The keys of its cache are packed for the
    kernels.
    """

    kernels = "compiled"

    def __init__(self, architecture: Architecture, *, layers: list[Layer], **parts: Any) -> None:
        """See `Decoder`."""
        super().__init__(architecture, layers=layers, **parts)
        a = architecture
        self._library = library()
        self._native_layers = [NativeLayer(layer) for layer in layers]
        described = zip(self._native_layers, a.sliding_windows, self.rotary.kinds, strict=True)
        self._structs = (LayerStruct * len(layers))(
            *(layer.struct(window or 0, kind) for layer, window, kind in described)
        )
        self._model = ModelStruct(
            *(a.hidden_size, a.n_heads, a.n_kv_heads, a.head_dim, a.ffn_size, a.norm_eps),
            *(_CACHE_KINDS[self.cache_dtype], _ACTIVATIONS[a.activation]),
            ctypes.addressof(self._structs),
        )
        looked_up = self.embedding if self.embedding_scale is None else None
        self._embedding = looked_up.pointer if isinstance(looked_up, PackedEmbedding) else None
        self._narrowest = a.hidden_size // LANES
        self._model_pointer = ctypes.addressof(self._model)
        self._final_norm_weight = weight_of(self.final_norm)
        self._pointers: tuple[tuple[Matrix, ...], ctypes.Array[ctypes.c_void_p]] | None = None
        self._tables: dict[int, _RotaryTables] = {}  # by capacity, of the last few caches

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """See `Decoder`; its slots are a multiple of the kernels' tiles."""
        cache = super().new_cache(-(-capacity // (2 * LANES)) * 2 * LANES, batch_size)
        cache.capacity = capacity  # by which LongRoPE chooses its factors
        return cache

    def run(self, hidden: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """See `Decoder`."""
        self._check_layers(start, stop)
        if start == stop or not hidden.numel():
            return hidden
        b, t, d = hidden.shape
        self._check_fit(b, t, cache)
        hidden = readable(hidden.reshape(b * t, d), self.architecture.hidden_size)
        out = torch.empty_like(hidden)
        tables = self._rotary_tables(cache.capacity)
        self._library.layerskip_run(
            self._model_pointer,
            hidden.data_ptr(),
            out.data_ptr(),
            cache.lengths.data_ptr(),
            *(b, t, start, stop),
            cache.slots.data_ptr(),
            cache.slots.shape[-2],
            tables.pointers,
            team_size(self._narrowest),
        )
        return out.view(b, t, d)

    def run_rows(
        self, hidden: Tensor, start: int, stop: int, rows: Sequence[tuple[KVCache, int]]
    ) -> Tensor:
        """See `Decoder`."""
        self._check_layers(start, stop)
        if start == stop or not len(hidden):
            return hidden
        hidden = readable(hidden, self.architecture.hidden_size)
        out = torch.empty_like(hidden)
        tables = list[_RotaryTables]()  # alive during the call
        sequences = (SequenceStruct * len(rows))()
        for sequence, (cache, n) in zip(sequences, rows, strict=True):
            self._check_fit(1, n, cache)
            tables.append(self._rotary_tables(cache.capacity))
            sequence.length, sequence.positions = int(cache.lengths), n
            sequence.slots, sequence.capacity = cache.slots.data_ptr(), cache.slots.shape[-2]
            sequence.stride = cache.slots.stride(1) * cache.slots.itemsize
            sequence.turns = ctypes.addressof(tables[-1].pointers)
        self._library.layerskip_run_rows(
            *(self._model_pointer, hidden.data_ptr(), out.data_ptr()),
            *(ctypes.addressof(sequences), len(rows), start, stop),
            team_size(self._narrowest),
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`; float32."""
        b, t, d = hidden.shape
        norm, eps = self._final_norm_weight, self.architecture.norm_eps
        rows = hidden.reshape(b * t, d)
        threads = team_size(self._narrowest)
        products = [head.normed_product(rows, norm, eps, threads) for head in self._packed_heads]
        return self._capped([product.view(b, t, product.shape[1]) for product in products])

    def greedy_tokens(self, hidden: Tensor) -> Tensor:
        """See `Decoder`; no logits are written to memory."""
        if self.architecture.logit_cap is not None:  # which can make two logits equal
            return super().greedy_tokens(hidden)
        return self._choose(hidden, with_confidence=False)[0]

    def greedy_choice(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder`; no logits are written to memory."""
        if self.architecture.logit_cap is not None:
            return super().greedy_choice(hidden)
        tokens, confidences = self._choose(hidden, with_confidence=True)
        assert confidences is not None
        return tokens, confidences.view_as(tokens)

    def _choose(self, hidden: Tensor, *, with_confidence: bool) -> tuple[Tensor, Tensor | None]:
        b, t, d = hidden.shape
        norm, eps = self._final_norm_weight, self.architecture.norm_eps
        # As many threads as the layers: OpenMP sets up a team of another size anew.
        threads, rows = team_size(self._narrowest), hidden.reshape(b * t, d)
        tokens, confidences = choose(
            self._head_pointers(), rows, norm, eps, threads=threads, confident=with_confidence
        )
        return tokens.view(b, t), confidences

    def greedy_step(
        self, tokens: Tensor, stop: int, cache: KVCache, *, with_confidence: bool = False
    ) -> tuple[Tensor, Tensor, float]:
        """See `Decoder`; in one call."""
        b, t = tokens.shape
        if self._embedding is None or not self._is_one_call(b, t, (0, stop)):
            return super().greedy_step(tokens, stop, cache, with_confidence=with_confidence)
        tokens = tokens.to("cpu", torch.int64).contiguous()
        looked_up = torch.empty(*tokens.shape, self.architecture.hidden_size, **FLOATS)
        return self._step(tokens, looked_up, (0, stop), cache, 1, with_confidence)

    def greedy_pass(
        self,
        hidden: Tensor,
        layers: tuple[int, int],
        cache: KVCache,
        *,
        n_scored: int = 1,
        with_confidence: bool = False,
    ) -> tuple[Tensor, Tensor, float]:
        """See `Decoder`; in one call."""
        b, t, d = hidden.shape
        if not self._is_one_call(b, t, layers):
            return super().greedy_pass(
                hidden, layers, cache, n_scored=n_scored, with_confidence=with_confidence
            )
        hidden = readable(hidden.reshape(b * t, d), self.architecture.hidden_size).view(b, t, d)
        return self._step(None, hidden, layers, cache, n_scored, with_confidence)

    def _is_one_call(self, b: int, t: int, layers: tuple[int, int]) -> bool:
        """Return whether `_step` can run these layers over T positions of B rows.

        The kernel scores the last rows in memory: those of one prompt, or one position of each.
        """
        return self.architecture.logit_cap is None and layers[0] < layers[1] and 1 in (b, t)

    def _step(
        self,
        tokens: Tensor | None,
        entering: Tensor,
        layers: tuple[int, int],
        cache: KVCache,
        n_scored: int,
        with_confidence: bool,
    ) -> tuple[Tensor, Tensor, float]:
        """Run layers and head; tokens are looked up first, into the states that enter the layers."""
        b, t, _ = entering.shape
        self._check_layers(*layers)
        self._check_fit(b, t, cache)
        hidden = torch.empty_like(entering)
        chosen = torch.empty(b, n_scored, dtype=torch.int64, device="cpu")
        confidence = torch.empty(b * n_scored, **FLOATS) if with_confidence else None
        heads, tables = self._head_pointers(), self._rotary_tables(cache.capacity)
        looked_up = (None, None) if tokens is None else (self._embedding, tokens.data_ptr())
        self._library.layerskip_step(
            *(self._model_pointer, *looked_up),
            *(entering.data_ptr(), hidden.data_ptr(), cache.lengths.data_ptr(), b, t),
            *(*layers, cache.slots.data_ptr(), cache.slots.shape[-2], tables.pointers),
            *(t - n_scored, heads, len(heads), self._final_norm_weight.data_ptr()),
            *(chosen.data_ptr(), None if confidence is None else confidence.data_ptr()),
            team_size(self._narrowest),
        )
        return hidden, chosen, 1.0 if confidence is None else float(confidence[0])

    @property
    def drafts_in_one_call(self) -> bool:  # type: ignore[override]
        """See `Decoder`."""
        return self._embedding is not None and self.architecture.logit_cap is None

    def greedy_draft(
        self,
        tokens: Tensor,
        stop: int,
        cache: KVCache,
        rule: DraftRule,
        token_ids: Tensor | None = None,
    ) -> GreedyDraft:
        """Draft one token greedily, and further ones until a rule ends the draft, in one call.

        Args:
            tokens: [1, T] int64, those that follow the cache.
            stop: how many layers run, E, at least 1.
            cache: its length is left to the caller, as by `run`.
            rule: decides by the highest softmax probability of each token.
            token_ids: those that a reduced head scores; None = all.
        """
        self._check_layers(1, stop)
        tokens = tokens.to("cpu", torch.int64).contiguous()
        sources = self._embedding, tokens.data_ptr(), None, 0.0, None, None
        return self._draft(sources, tokens.shape[1], stop, cache, rule, token_ids)

    def adapter_draft(
        self,
        exit_states: Tensor,
        previous: Tensor,
        cache: KVCache,
        rule: DraftRule,
        token_ids: Tensor,
        projection: PackedMatrix,
        base: "NativeDecoder",
        eps: float,
    ) -> GreedyDraft:
        """Draft as `greedy_draft` does, with the layers of an exit adapter of E = 0, in one call.

        Args:
            exit_states: [N, D], embeddings of the positions that the adapter has not seen.
            previous: [N, D], the last layer's states one position back.
            cache: of the adapter; its length is left to the caller.
            rule: see `greedy_draft`.
            token_ids: see `greedy_draft`.
            projection: of both states, normalized and side by side.
            base: has the embedding; its `drafts_in_one_call` is true.
            eps: of that normalization.
        """
        width = self.architecture.hidden_size
        exit_states, previous = readable(exit_states, width), readable(previous, width)
        pointers = exit_states.data_ptr(), previous.data_ptr()
        sources = base._embedding, None, ctypes.addressof(projection.struct), eps, *pointers
        n, n_layers = len(exit_states), len(self.layers)
        return self._draft(sources, n, n_layers, cache, rule, token_ids)

    def _draft(
        self,
        sources: Sequence[Any],
        n: int,
        stop: int,
        cache: KVCache,
        rule: DraftRule,
        token_ids: Tensor | None,
    ) -> GreedyDraft:
        """Draft after n positions; sources: the kernel's arguments from embedding to previous."""
        limit = rule.limit
        self._check_fit(1, n + limit, cache)
        entering = torch.empty(n + limit, self.architecture.hidden_size, **FLOATS)
        leaving = torch.empty_like(entering)
        chosen = torch.empty(1, limit, dtype=torch.int64, device="cpu")
        probabilities = torch.empty(limit, **FLOATS)
        # Faster to make than arrays of `ctypes`.
        acceptance, costs = array("d", rule.acceptance), array("d", rule.costs[rule.n_drafted :])
        ends = array("q", rule.ends)
        native_rule = RuleStruct(
            *(rule.rate, rule.mean, rule.head, rule.overhead, rule.survival),
            *(numbers.buffer_info()[0] for numbers in (acceptance, costs, ends)),
            *(len(acceptance), len(ends), limit, rule.lookahead),
        )
        heads, tables = self._head_pointers(), self._rotary_tables(cache.capacity)
        self._library.layerskip_draft(
            *(self._model_pointer, *sources, entering.data_ptr(), leaving.data_ptr()),
            *(int(cache.lengths), n, stop),
            *(cache.slots.data_ptr(), cache.slots.shape[-2], tables.pointers),
            *(heads, len(heads), self._final_norm_weight.data_ptr()),
            *(None if token_ids is None else token_ids.data_ptr(), ctypes.addressof(native_rule)),
            *(chosen.data_ptr(), probabilities.data_ptr(), team_size(self._narrowest)),
        )
        scored, kept = native_rule.scored, native_rule.kept
        confidences = probabilities[:scored].tolist()
        return GreedyDraft(leaving[None, : n + kept], chosen[:, :scored], confidences, kept)

    def with_reduced_head(self, token_ids: Tensor) -> "NativeDecoder":
        """See `Decoder`; of a decoder with int8 weights the head is in int8 too."""
        reduced = super().with_reduced_head(token_ids)
        assert isinstance(reduced, NativeDecoder)
        if self.weights == "int8":
            reduced.heads = tuple(head.in_int8() for head in reduced._packed_heads)
        return reduced

    def _check_fit(self, rows: int, n: int, cache: KVCache) -> None:
        """Raise ValueError where the kernels would write beyond the cache, with n positions more."""
        a, slots, lengths = self.architecture, cache.slots, cache.lengths
        if rows != len(lengths):
            raise ValueError(f"the KV cache has {len(lengths)} rows, {rows} are given")
        room, width = slots.shape[-2], slot_width(a.head_dim, self.cache_dtype)
        if (
            slots.shape != (a.n_layers, 2, rows, a.n_kv_heads, room, width)
            or room % (2 * LANES)
            or room < cache.capacity
            or not _is_contiguous(slots, self.cache_dtype)
            or not _is_contiguous(lengths, torch.int64)
        ):
            raise ValueError("the KV cache is not one of this decoder's `new_cache`")
        cache.check_room(n)

    def _head_pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        if (
            self._pointers is None or self._pointers[0] is not self.heads
        ):  # a copy with a reduced head
            self._pointers = self.heads, pointers_to(self._packed_heads)
        return self._pointers[1]

    @property
    def _packed_heads(self) -> list[PackedMatrix]:
        return [head for head in self.heads if isinstance(head, PackedMatrix)]

    def _rotary_tables(self, capacity: int) -> "_RotaryTables":
        """Return the rotary factors of every position of a cache, for each kind of embedding.

        The caller keeps them alive during its call: another thread may replace them meanwhile.
        """
        tables = self._tables.get(capacity)
        if tables is None:
            kinds = range(self.rotary.n_kinds)
            tables = _RotaryTables([self.rotary.table(k, capacity) for k in kinds])
            self._tables = {**dict(list(self._tables.items())[-_MAX_TABLES:]), capacity: tables}
        return tables


class _RotaryTables:
    """Rotary factors of every position, and pointers to them."""

    def __init__(self, tables: list[Tensor]) -> None:
        self.tables = tables
        self.pointers = (ctypes.c_void_p * len(tables))(*(table.data_ptr() for table in tables))


def _is_contiguous(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
