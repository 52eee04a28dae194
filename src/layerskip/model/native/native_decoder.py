"""`Decoder` with its layers run by the compiled kernels: hidden states in float32, on the CPU."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.model.architecture import Architecture
from layerskip.model.decoder import MLP, Decoder, GoesOn, HeadNorm, Layer, RMSNorm
from layerskip.model.distributions import NON_FINITE_MESSAGE, Distributions, Draws, shares
from layerskip.model.families import FAMILIES
from layerskip.model.kv_cache import KVCache
from layerskip.model.native.build import library, num_threads_to_use
from layerskip.model.native.packed import (
    FLOATS,
    KINDS,
    LANES,
    MatrixStruct,
    PackedEmbedding,
    PackedMatrix,
    choose,
    fits,
    pointer_to,
    pointers_to,
    readable,
)
from layerskip.model.quantize import Matrix


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
        ("qkv", MatrixStruct),
        ("attention_out", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
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


class HeldLayer:
    """One layer's vectors in float32, kept for the kernels."""

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
        self._matrices = [product for product in products if isinstance(product, PackedMatrix)]

    def struct(self, window: int, rope: int) -> LayerStruct:
        """Where the layer's parts are; valid as long as it lives."""
        pointers = [None if w is None else w.data_ptr() for w in self._weights]
        return LayerStruct(*pointers, window, rope, *(m.struct for m in self._matrices))


def weight_of(norm: object) -> Tensor:
    """A norm's weights as the kernels read them."""
    assert isinstance(norm, RMSNorm | HeadNorm)
    return norm.weight.float().contiguous()


_BLOCK = 256  # as in `kernels.cpp`
NO_DRAWING = (None, 0.0, None, None, None, None)  # what `layerskip_step` is given where it chooses


class BlockSoftmax(Distributions):
    """The softmax of some logits by a temperature, of which no more is worked out than is asked for.

    To divide all weights by their sum and write them down takes a small model as long as a layer, and a
    draw from them that looks at all of them takes longer.

    Args:
        heads: whose logits they are, one after the other.
        pointers: see `panels.pointers_to`.
        rows: B.
        positions: T of each.
        temperature: above 0.

    Attributes:
        arguments: of the kernels that fill it in: the temperature, and where what they find goes.
    """

    looked_up = True

    def __init__(
        self,
        heads: Sequence[PackedMatrix],
        pointers: ctypes.Array[ctypes.c_void_p],
        rows: int,
        positions: int,
        temperature: float,
    ) -> None:
        self._heads, self._pointers, self._temperature = heads, pointers, temperature
        sizes = [head.shape[0] for head in heads]
        self._logits = torch.empty(rows, positions, sum(sizes), **FLOATS)
        n_blocks = sum(-(-size // _BLOCK) for size in sizes)
        self._blocks = torch.empty(rows, positions, n_blocks, **FLOATS)
        whole = torch.empty(rows, positions, 2, **FLOATS)
        places = (x.data_ptr() for x in (self._logits, self._blocks, whole))
        self.arguments = (temperature, *places)
        # NumPy looks one number up in a tenth of the time that PyTorch takes.
        self._found, self._whole = self._logits.numpy(), whole.numpy()

    def __getitem__(self, at: Any) -> Tensor:
        """See `Distributions`."""
        whole = torch.from_numpy(self._whole)[at]
        logits = self._logits[at] - whole[..., :1]
        return (logits / self._temperature).exp_().div_(whole[..., 1:])

    def of(self, i: int, tokens: Tensor) -> Tensor:
        """See `Distributions`."""
        chances = [[self.chance(row, i, token)] for row, (token,) in enumerate(tokens.tolist())]
        return torch.tensor(chances, **FLOATS)

    def draw(self, i: int, share: Tensor) -> Tensor:
        """See `Distributions`."""
        drawn = [[self.pick(row, i, part)] for row, (part,) in enumerate(share.tolist())]
        return torch.tensor(drawn, device="cpu")

    def chance(self, row: int, i: int, token: int) -> float:
        """How likely a token is."""
        top, total = self._whole[row, i].tolist()
        return math.exp((float(self._found[row, i, token]) - top) / self._temperature) / total

    def pick(self, row: int, i: int, share: float) -> int:
        """The token of one row, as `draw` finds it."""
        found: int = library().layerskip_draw(
            *(self._pointers, len(self._pointers)),
            *(pointer_to(self._logits, row, i), pointer_to(self._blocks, row, i)),
            *(self._whole[row, i, 0], self._temperature, share),
        )
        if found < 0:
            raise ValueError(NON_FINITE_MESSAGE)
        return found


class Drawing:
    """What `layerskip_step` draws by, and what has to live while it does: nothing without draws.

    Args:
        heads: see `BlockSoftmax`.
        pointers: see there.
        draws: to which what is drawn is added.
        rows: B, of one position each.

    Attributes:
        arguments: of the kernel.
    """

    def __init__(
        self,
        heads: Sequence[PackedMatrix],
        pointers: ctypes.Array[ctypes.c_void_p],
        draws: Draws | None,
        rows: int,
    ) -> None:
        self.arguments: tuple[int | float | None, ...] = NO_DRAWING
        self._drawn = None
        if draws is not None:
            self._share = shares(rows, torch.device("cpu"), draws.generator)
            self._drawn = torch.empty(rows, 1, dtype=torch.int64, device="cpu")
            found = BlockSoftmax(heads, pointers, rows, 1, draws.temperature)
            draws.drawn.append((found, self._drawn))
            self.arguments = (
                self._share.data_ptr(),
                *found.arguments,
                self._drawn.data_ptr(),
            )

    @property
    def failed(self) -> bool:
        """Whether what a row was to be drawn from is no number."""
        return self._drawn is not None and any(token < 0 for (token,) in self._drawn.tolist())


_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_WIDEST_HEAD = 1024


def supports(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels know everything that this architecture has."""
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


class NativeDecoder(Decoder):
    """The same decoder, whose results do not depend on how many positions a pass has.

    Its parts are `PackedMatrix` and RMS norms, as `supports` makes sure; hidden states and logits are
    float32. The keys of its cache are laid out in panels, which nobody else can read.
    """

    kernels = "compiled"

    def __init__(self, architecture: Architecture, *, layers: list[Layer], **parts: Any) -> None:
        """See `Decoder`."""
        super().__init__(architecture, layers=layers, **parts)
        a = architecture
        self._library = library()
        self._held = [HeldLayer(layer) for layer in layers]
        described = zip(self._held, a.sliding_windows, self.rotary.kinds, strict=True)
        self._structs = (LayerStruct * len(layers))(
            *(held.struct(window or 0, kind) for held, window, kind in described)
        )
        self._model = ModelStruct(
            *(a.hidden_size, a.n_heads, a.n_kv_heads, a.head_dim, a.ffn_size, a.norm_eps),
            *(KINDS[self.dtype], _ACTIVATIONS[a.activation], ctypes.addressof(self._structs)),
        )
        looked_up = self.embedding if self.embedding_scale is None else None
        self._embedding = looked_up.pointer if isinstance(looked_up, PackedEmbedding) else None
        self._narrowest = a.hidden_size // LANES
        self._model_pointer = ctypes.addressof(self._model)
        self._final_norm_weight = weight_of(self.final_norm)
        self._pointers: tuple[tuple[Matrix, ...], ctypes.Array[ctypes.c_void_p]] | None = None
        self._turns: _Turns | None = None  # of the last cache's capacity

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """See `Decoder`; its slots are whole tiles of positions."""
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
        turns = self._turn_tables(cache.capacity)
        self._library.layerskip_run(
            self._model_pointer,
            hidden.data_ptr(),
            out.data_ptr(),
            cache.lengths.data_ptr(),
            *(b, t, start, stop),
            cache.slots.data_ptr(),
            cache.slots.shape[-2],
            turns.pointers,
            num_threads_to_use(self._narrowest),
        )
        return out.view(b, t, d)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`; float32."""
        b, t, d = hidden.shape
        norm, eps = self._final_norm_weight, self.architecture.norm_eps
        rows = hidden.reshape(b * t, d)
        threads = num_threads_to_use(self._narrowest)
        products = [head.normed_product(rows, norm, eps, threads) for head in self._panels]
        return self._capped([product.view(b, t, product.shape[1]) for product in products])

    def choose(self, hidden: Tensor) -> Tensor:
        """See `Decoder`; no logits are written down."""
        if self.architecture.logit_cap is not None:  # which can make two of them equal
            return super().choose(hidden)
        return self._choice(hidden)[0]

    def choose_with_probability(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        if self.architecture.logit_cap is not None:
            return super().choose_with_probability(hidden)
        chosen, probabilities = self._choice(hidden, confident=True)
        assert probabilities is not None
        return chosen, probabilities.view(hidden.shape[:2])

    def distributions(self, hidden: Tensor, temperature: float = 1.0) -> Distributions:
        """See `Decoder`; in one call, by all threads."""
        if self.architecture.logit_cap is not None:
            return super().distributions(hidden, temperature)
        b, t, d = hidden.shape
        rows = readable(hidden.reshape(b * t, d), self.architecture.hidden_size)
        heads = self._head_pointers()
        found = BlockSoftmax(self._panels, heads, b, t, temperature)
        self._library.layerskip_soften(
            *(heads, len(heads), self._final_norm_weight.data_ptr(), self.architecture.norm_eps),
            *(rows.data_ptr(), b * t, *found.arguments, num_threads_to_use(self._narrowest)),
        )
        return found

    def step(self, last: Tensor, stop: int, cache: KVCache, draws: Draws | None = None) -> Tensor:
        """See `Decoder`; in one call."""
        if self.architecture.logit_cap is not None or not stop:
            return super().step(last, stop, cache, draws)
        self._check_layers(0, stop)
        self._check_fit(len(last), 1, cache)
        tokens, hidden = self._entering(last)
        chosen = torch.empty(last.shape, dtype=torch.int64, device="cpu")
        state = torch.empty_like(hidden)
        heads, turns = self._head_pointers(), self._turn_tables(cache.capacity)
        drawing = Drawing(self._panels, heads, draws, len(last))
        self._library.layerskip_step(
            *(self._model_pointer, self._embedding, tokens.data_ptr()),
            *(hidden.data_ptr(), state.data_ptr(), cache.lengths.data_ptr()),
            *(len(last), 1, 0, stop, cache.slots.data_ptr(), cache.slots.shape[-2], turns.pointers),
            *(0, heads, len(heads), self._final_norm_weight.data_ptr(), None),
            *(chosen.data_ptr(), None, *drawing.arguments, num_threads_to_use(self._narrowest)),
        )
        if drawing.failed:
            raise ValueError(NON_FINITE_MESSAGE)
        return chosen

    def verify(self, states: Tensor, start: int, cache: KVCache) -> Tensor:
        """See `Decoder`; in one call."""
        stop = len(self.layers)
        if self.architecture.logit_cap is not None or not start < stop or not states.numel():
            return super().verify(states, start, cache)
        self._check_layers(start, stop)
        b, t, d = states.shape
        self._check_fit(b, t, cache)
        hidden = readable(states.reshape(b * t, d), self.architecture.hidden_size)
        chosen, out = torch.empty(b, t, dtype=torch.int64, device="cpu"), torch.empty_like(hidden)
        heads, turns = self._head_pointers(), self._turn_tables(cache.capacity)
        self._library.layerskip_step(
            *(self._model_pointer, None, None),
            *(hidden.data_ptr(), out.data_ptr(), cache.lengths.data_ptr()),
            *(b, t, start, stop, cache.slots.data_ptr(), cache.slots.shape[-2], turns.pointers),
            *(0, heads, len(heads), self._final_norm_weight.data_ptr(), None),
            *(chosen.data_ptr(), None, *NO_DRAWING, num_threads_to_use(self._narrowest)),
        )
        return chosen

    def draft(
        self,
        last: Tensor,
        n: int,
        exit_layer: int,
        cache: KVCache,
        short: Decoder | None = None,
        token_ids: Tensor | None = None,
        goes_on: GoesOn | None = None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Decoder`; one call a token."""
        exit_ = self if short is None else short
        rows, unseen = last.shape
        if (
            self.architecture.logit_cap is not None
            or not isinstance(exit_, NativeDecoder)
            or (unseen > 1 and (rows > 1 or not n))  # what is scored stands behind all that is not
        ):
            return super().draft(last, n, exit_layer, cache, short, token_ids, goes_on, draws)
        self._check_layers(0, exit_layer)
        self._check_fit(rows, unseen - 1 + n, cache)
        if token_ids is not None:
            token_ids = token_ids.to("cpu", torch.int64).contiguous()
            if len(token_ids) != sum(head.shape[0] for head in exit_._panels):
                raise ValueError(f"{len(token_ids)} token ids are not one for each logit")
        # Written row by row of a draft: what little Python does for a token counts beside a few layers.
        states = torch.empty(unseen - 1 + n, rows, self.architecture.hidden_size, **FLOATS)
        tokens = torch.empty(n, rows, 1, dtype=torch.int64, device="cpu")
        probabilities = torch.empty(n, rows, **FLOATS)
        ids, confidences = tokens.numpy().reshape(-1), probabilities.numpy().reshape(-1)
        settled = cache.lengths.numpy()
        state, width = states.data_ptr(), rows * states.shape[2] * states.itemsize
        confidence = None if goes_on is None else probabilities.data_ptr()
        heads, turns = exit_._head_pointers(), self._turn_tables(cache.capacity)
        slots = cache.slots
        where = (0, exit_layer, slots.data_ptr(), slots.shape[-2], turns.pointers)
        norm, lengths = self._final_norm_weight.data_ptr(), cache.lengths.data_ptr()
        which = None if token_ids is None else token_ids.data_ptr()
        threads, made, newest = num_threads_to_use(self._narrowest), 0, last
        while made < n:
            (entering, hidden), newest = self._entering(newest), tokens[made]
            t = entering.shape[1]
            drawing = Drawing(exit_._panels, heads, draws, rows)
            self._library.layerskip_step(
                *(self._model_pointer, self._embedding, entering.data_ptr()),
                *(hidden.data_ptr(), state, lengths, rows, t),
                *(*where, t - 1, heads, len(heads), norm, which),
                newest.data_ptr(),
                None if confidence is None else confidence + made * rows * probabilities.itemsize,
                *(*drawing.arguments, threads),
            )
            settled += t
            state += t * width
            made += 1
            if goes_on is not None and not goes_on(
                int(ids[made - 1]), float(confidences[made - 1])
            ):
                break
        return states[: unseen - 1 + made].transpose(0, 1), tokens[:made, :, 0].T

    def _entering(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] as the kernels read them, and hidden states, which those look up if they can."""
        if self._embedding is None:
            return tokens, self.embed(tokens).float()
        tokens = tokens.to("cpu", torch.int64).contiguous()
        return tokens, torch.empty(*tokens.shape, self.architecture.hidden_size, **FLOATS)

    def _check_fit(self, rows: int, n: int, cache: KVCache) -> None:
        """Raise ValueError where C would reach beyond the cache: n positions more of so many rows."""
        a, slots, lengths = self.architecture, cache.slots, cache.lengths
        if rows != len(lengths):
            raise ValueError(f"the KV cache has {len(lengths)} rows, {rows} are given")
        room = slots.shape[-2]
        if (
            slots.shape != (a.n_layers, 2, rows, a.n_kv_heads, room, a.head_dim)
            or room % (2 * LANES)
            or room < cache.capacity
            or not _is_laid_out(slots, self.dtype)
            or not _is_laid_out(lengths, torch.int64)
        ):
            raise ValueError("the KV cache is not one of this decoder's `new_cache`")
        cache.check_room(n)

    def _head_pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        if self._pointers is None or self._pointers[0] is not self.heads:  # a copy has others
            self._pointers = self.heads, pointers_to(self._panels)
        return self._pointers[1]

    def _choice(self, hidden: Tensor, confident: bool = False) -> tuple[Tensor, Tensor | None]:
        b, t, d = hidden.shape
        norm, eps = self._final_norm_weight, self.architecture.norm_eps
        rows = hidden.reshape(b * t, d)
        threads = num_threads_to_use(
            self._narrowest
        )  # as many as the layers: teams of two sizes are made anew
        heads = self._head_pointers()
        chosen, probabilities = choose(heads, rows, norm, eps, threads=threads, confident=confident)
        return chosen.view(b, t), probabilities

    @property
    def _panels(self) -> list[PackedMatrix]:
        return [head for head in self.heads if isinstance(head, PackedMatrix)]

    def _turn_tables(self, capacity: int) -> "_Turns":
        """For each kind of rotary embedding the turns of every position of the cache.

        Whoever passes the pointers on holds these until the call is over: another thread's cache may
        be of another capacity, and its tables take this place.
        """
        turns = self._turns
        if turns is None or turns.capacity != capacity:
            kinds = range(self.rotary.n_kinds)
            turns = self._turns = _Turns(capacity, [self.rotary.table(k, capacity) for k in kinds])
        return turns


class _Turns:
    """The turns of every position, and where they are."""

    def __init__(self, capacity: int, tables: list[Tensor]) -> None:
        self.capacity, self.tables = capacity, tables
        self.pointers = (ctypes.c_void_p * len(tables))(*(table.data_ptr() for table in tables))


def _is_laid_out(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
