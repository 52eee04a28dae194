"""Liger's fused linear cross entropy, which the exit loss uses where it is installed and fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.recipe.anatomy import Anatomy, is_sharded

FusedLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
DEVICES = ("cuda",)  # where its kernels run


def fused_loss(anatomy: Anatomy, device: torch.device) -> FusedLoss | None:
    """An exit's cross entropy by kernels that never hold its logits; None where there are none.

    They need the package liger-kernel, from 0.8 on, a GPU, and a head that is a plain linear layer
    whose weights are all on this device, whose forward is not replaced, and whose logits are not scaled
    afterwards.

    Returns:
        Called with hidden states [N, D] that leave a layer and labels [N], none ignored: the sum in
        nats, a scalar with gradient, and the first choice of every token, int [N].
    """
    head = anatomy.head
    kind = type(head).__bases__[-1] if is_sharded(head) else type(head)  # FSDP2 puts its own before
    is_plain = kind is nn.Linear and "forward" not in vars(head)
    is_plain = is_plain and not hasattr(head.weight, "ds_id")  # DeepSpeed ZeRO-3
    if device.type not in DEVICES or not is_plain or anatomy.logits_factor != 1:
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError:
        return None
    known = inspect.signature(fused).parameters
    if "return_predicted_tokens" not in known:
        return None
    # Of the head's gradient, a sum over many pieces; else that of the weights, 16 bits with FSDP.
    accumulated: dict[str, Any] = {"accum_dtype": torch.float32} if "accum_dtype" in known else {}

    def loss(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        states = anatomy.normed(hidden)
        if torch.is_autocast_enabled(kind):  # which does not reach all products in there
            states = states.to(torch.get_autocast_dtype(kind))
        result = fused(
            states,
            head.weight,
            labels,
            bias=head.bias,
            reduction="sum",
            softcap=anatomy.logits_cap,
            return_predicted_tokens=True,
            **accumulated,
        )
        return result.loss, result.predicted_tokens

    return loss
