"""One forward pass of a model with the recipe: which rows skip what, and what is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from layerskip.recipe.compiling import compiled_below, not_compiled
from layerskip.recipe.layer_dropout import run_on_kept_rows, skip_layer


@dataclass
class ForwardPass:
    """The rows that skip each layer, and the states and routing noted while the pass runs.

    Attributes:
        skipped: bool [layers, B], True = skipped; None = no layer dropout.
        wanted: exits whose hidden states are noted.
        states: hidden states [B, T, D] that left exit E.
        router_logits: (layer, [tokens, experts]) of a mixture of experts.
        others: how many values a layer returns in a tuple behind its hidden states; None = no tuple.
        is_running: False once the pass is over; the draw stays for replays in backward, which note
            nothing.
    """

    skipped: Tensor | None
    wanted: frozenset[int] = frozenset()
    states: dict[int, Tensor] = field(default_factory=dict)
    router_logits: list[tuple[int, Tensor]] = field(default_factory=list)
    others: int | None = None
    is_running: bool = True

    @compiled_below
    def run_layer(
        self, number: int, layer: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run layer `number`, from 0, on the rows that do not skip it, and note its output."""
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        skipped = None if self.skipped is None else self.skipped[number]
        output: Any
        if skipped is None or not skipped.any():
            output = plain(hidden, *args, **kwargs)
            self.others = len(output) - 1 if isinstance(output, tuple) else None
        elif skipped.all():
            output = skip_layer(hidden, [p for p in layer.parameters() if p.requires_grad])
            output = output if self.others is None else (output, *[None] * self.others)
        else:
            output = run_on_kept_rows(plain, skipped, hidden, args, kwargs)
        if self.is_running and number + 1 in self.wanted:
            self.states[number + 1] = output[0] if isinstance(output, tuple) else output
        return output

    @not_compiled
    def note_routing(self, number: int, logits: Tensor) -> None:
        """Keep the logits [tokens, experts] with which layer `number` chose experts."""
        self.router_logits.append((number, logits))

    def balancing_loss(self, mask: Tensor | None, top_k: int) -> Tensor:
        """Load balancing loss of the experts over the tokens each layer routed, without padding.

        transformers' own, which takes every layer to have routed the whole batch only with a mask.

        Args:
            mask: int [B, T], 0 = padding; another kind of mask is taken as no padding.
            top_k: experts a token is sent to.
        """
        # Takes a while to import, and most models have no experts.
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        routed: list[Tensor] = []
        for number, logits in self.router_logits:
            chosen = logits
            if mask is not None and mask.ndim == 2:
                kept = mask if self.skipped is None else mask[~self.skipped[number].to(mask.device)]
                chosen = logits[kept.flatten() > 0]
            routed.append(chosen.float())
        over_all: Any = load_balancing_loss_func  # whose types know one layer alone
        return over_all(tuple(routed), routed[0].shape[-1], top_k)
