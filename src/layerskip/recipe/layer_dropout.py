"""Layer dropout: rows of a batch skip a decoder layer, and its computation is saved.

LayerSkip (arXiv 2404.16710), section 4.1: `x_{l+1} = x_l + M(p) * f_l(x_l)`. The layer runs on the
kept rows only; a skipped row passes unchanged, and nothing is rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.recipe.model_parts import compiled_below, not_compiled

# Per-row arguments of a decoder layer have at least the dimensions (row, token); one-dimensional
# ones are per token (cache positions, cumulative lengths). Rotary tables are [rows, tokens, head
# size]; with two dimensions they are shared by all rows, even where B == T. A position bias is
# [heads, 1, tokens].
_ROW_DIMENSIONS = {"position_embeddings": 3, "position_bias": 4}
_REFUSED = {
    "cache": "a KV cache",
    "past_key_values": "a KV cache",
    "past_key_value": "a KV cache",
    "layer_past": "a KV cache",
    "cu_seq_lens_q": "cumulative sequence lengths with more than one row",
}


def sample_skipped_rows(
    rates: Sequence[float], rows: int, *, seed: int, step: int, micro_batch: int
) -> Tensor:
    """Sample M(p): the rows that skip each layer, as a function of the arguments alone.

    Every device samples the same on its own host, so none waits for another. A device with fewer rows
    (the end of an epoch) gets the first rows of the same sample.

    Args:
        rates: p_{l,t} of every layer.
        rows: rows of this batch.
        seed: the recipe's seed.
        step: optimizer step.
        micro_batch: number of the batch within an accumulated one.

    Returns:
        bool [layers, rows] on the CPU, True = skipped.
    """
    generator = torch.Generator()
    # Odd multipliers separate neighbouring (seed, step, micro_batch); 2**63 is the seed's limit.
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB
    generator.manual_seed(mixed % 2**63)
    on_host: Any = {"dtype": torch.float64, "device": "cpu"}  # not the default device
    uniform = torch.rand(rows, len(rates), generator=generator, **on_host)
    return (uniform < torch.tensor(rates, **on_host)).T.contiguous()


@compiled_below
def run_on_kept_rows(
    layer: Callable[..., Any],
    skipped: Tensor,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run f_l on the rows that do not skip it, of which there is at least one.

    Args:
        layer: called with (hidden, *args, **kwargs), returns hidden states or a tuple that begins
            with them.
        skipped: bool [B] on the CPU.
        hidden: [B, T, D].
        args: further positional arguments of the layer.
        kwargs: keyword arguments; tensors with one entry a row are sliced like hidden.

    Returns:
        The layer's output, with hidden states [B, T, D] for all rows.

    Raises:
        ValueError: an argument cannot be sliced by row.
    """
    _refuse_unsliceable(args, kwargs)
    # 1. Take the kept rows out of hidden states, masks, positions and rotary tables alike.
    kept_rows = torch.nonzero(~skipped).flatten()
    if hidden.device.type == "cuda":  # from pinned memory, the copy does not block the host
        kept_rows = kept_rows.pin_memory()
    kept_rows = kept_rows.to(hidden.device, non_blocking=hidden.device.type == "cuda")
    batch = hidden.shape[0]
    # 2. Run the layer on them.
    output = layer(
        hidden.index_select(0, kept_rows),
        *(_kept_rows(value, kept_rows, batch, 2) for value in args),
        **{
            name: _kept_rows(value, kept_rows, batch, _ROW_DIMENSIONS.get(name, 2))
            for name, value in kwargs.items()
        },
    )
    # 3. Put its output back among the skipped rows, which pass unchanged.
    kept_output = output[0] if isinstance(output, tuple) else output
    merged = hidden.to(kept_output.dtype).index_copy(0, kept_rows, kept_output)
    return (merged, *output[1:]) if isinstance(output, tuple) else merged


@not_compiled
def _kept_rows(value: Any, kept: Tensor, batch: int, dimensions: int) -> Any:
    """Take the kept rows of every tensor in a nested argument; others stay as they are."""
    if isinstance(value, Tensor):
        has_rows = value.ndim >= dimensions and value.shape[0] == batch
        return value.index_select(0, kept) if has_rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_kept_rows(item, kept, batch, dimensions) for item in value)
    if isinstance(value, dict):
        return {key: _kept_rows(item, kept, batch, dimensions) for key, item in value.items()}
    return value


@not_compiled
def _refuse_unsliceable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"layer dropout cannot take rows out of {what} ({name})")
    for value in (*args, *kwargs.values()):
        # A flex attention mask is a function of the row's index, which slicing changes.
        if type(value).__name__ == "BlockMask":
            raise ValueError(
                "layer dropout does not work with flex attention masks; load the model with "
                "attn_implementation='sdpa', 'eager' or a flash attention"
            )


class _PassThrough(torch.autograd.Function):
    """Identity that gives the parameters of a skipped layer a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.parameters))


@not_compiled
def skip_layer(hidden: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Skip a layer for all rows: the identity, with a gradient of zero for the layer's parameters.

    The zero follows from the equation. It also makes an optimizer with momentum behave the same on one
    device and on several, where DistributedDataParallel waits for every parameter's gradient.

    Args:
        hidden: [B, T, D], returned unchanged.
        parameters: the layer's trainable parameters.
    """
    apply: Any = _PassThrough.apply  # untyped in torch
    return apply(hidden, *parameters)
