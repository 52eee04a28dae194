"""Where a transformers causal LM keeps its layers, final norm and head.

What torch.compile leaves alone: it compiles the model's own layers, not what goes on between them.

Compiled too, the recipe's code would be compiled anew for every layer, draw and step, until
torch.compile gives up and runs all of it, layers included, as it stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel

_Function = TypeVar("_Function", bound=Callable[..., Any])
_disable: Any = torch.compiler.disable  # torch leaves it untyped


def not_compiled(function: _Function) -> _Function:
    """Neither the function nor what it calls is compiled."""
    return _disable(function)


def compiled_below(function: _Function) -> _Function:
    """The function runs as it stands; what it calls may be compiled."""
    return _disable(function, recursive=False)


_LAYERS = ("layers", "h", "blocks")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class ModelParts:
    """The parts of a causal LM that the recipe needs.

    Attributes:
        model: the causal LM.
        layers: its decoder layers, first to last.
        norm_name: name of the final norm in its decoder.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    norm_name: str

    # Norm and head are looked up at each use: PEFT may have put its own modules there since.
    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        model: Any = self.model  # transformers leaves its lookups untyped
        return getattr(model.get_decoder(), self.norm_name)

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        model: Any = self.model  # transformers leaves its lookups untyped
        return model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def is_balanced_mixture(self) -> bool:
        """Whether the model is a mixture of experts whose loss balances their load."""
        return bool(getattr(self.model.config, "output_router_logits", False))

    def routers(self, layer: nn.Module) -> list[tuple[nn.Module, int]]:
        """Modules of a layer that choose experts, and where in their output the logits are."""
        model: Any = self.model
        decoder = model.get_decoder()
        given = (decoder._can_record_outputs or {}).get("router_logits")
        found = []
        for recorder in given if isinstance(given, list | tuple) else [given] if given else []:
            kind: Any = getattr(recorder, "target_class", recorder)
            index, part = getattr(recorder, "index", 0), getattr(recorder, "layer_name", None)
            within = f".{part.strip('.')}." if part else "."
            for name, module in layer.named_modules():
                if kind and isinstance(module, kind) and within in f".{name}.":
                    found.append((module, index))
        return found

    @property
    def has_logits_to_keep(self) -> bool:
        """Whether the model can be asked for the logits of the last positions only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden states."""
        return _called(self.norm, hidden)

    def shared_exit(self, hidden: Tensor) -> Tensor:
        """g: hidden states [N, D] that leave any layer -> logits [N, V] as the model has."""
        logits = _called(self.head, self.normed(hidden))
        if self.logits_factor != 1:
            logits = logits * self.logits_factor
        if cap := self.logits_cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def logits_factor(self) -> float:
        """What the head's output is multiplied by."""
        config = self.model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None) or 1  # Granite
        return (getattr(config, "logit_scale", None) or 1) / divisor  # Cohere

    @property
    def logits_cap(self) -> float | None:
        """The size that logits cannot pass (Gemma 2)."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def exit_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the shared exit, whole: FSDP2 may hold them in parts.

        They stay whole until backward is over, which FSDP2 takes care of at its end.
        """
        parts = (self.norm, self.head)
        for part in parts:
            if is_sharded(part):
                part.unshard()
            weight, own = getattr(part, "weight", None), list(part.parameters())
            is_lent = isinstance(weight, Tensor) and weight.requires_grad
            if any(hasattr(p, "ds_id") for p in own) or (
                is_lent and not any(p.requires_grad for p in own)
            ):
                self.refuse(
                    "final norm or head have no whole weights of their own, as in DeepSpeed ZeRO stage 3"
                    " and FSDP version 1: take stage 2, or FSDP2"
                )
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def probe_inputs(self) -> dict[str, Tensor]:
        """Three rows of tokens, padded left, not at all and right; {} where weights are elsewhere.

        Weights are elsewhere on the meta device, and while DeepSpeed ZeRO-3 holds them in parts.
        """
        weights = list(self.model.parameters())
        if any(p.is_meta or hasattr(p, "ds_id") for p in weights):
            return {}
        device = weights[0].device
        ids = torch.arange(15, device=device).reshape(3, 5) % self.vocabulary
        mask = torch.ones_like(ids)
        mask[0, 0] = mask[2, 4] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @contextmanager
    def probing(self) -> Iterator[None]:
        """`evaluating`, in PyTorch's attention where the model has flash.

        Flash attention takes 16 bits alone, which it gets from autocast when it trains, and a GPU.
        """
        chosen = self.model.config._attn_implementation
        is_flash = isinstance(chosen, str) and "flash" in chosen
        if is_flash:
            has_sdpa = self.model._supports_sdpa  # Gemma 2 has not
            self.model.set_attn_implementation("sdpa" if has_sdpa else "eager")
        try:
            with self.evaluating():
                yield
        finally:
            if is_flash:
                self.model.set_attn_implementation(chosen)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """For a while evaluation without gradients; every module gets its own mode back afterwards."""
        modes = [(module, module.training) for module in self.model.modules() if module.training]
        self.model.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def refuse(self, why: str) -> NoReturn:
        """Raise ValueError: the recipe does not work for this model."""
        raise ValueError(f"the recipe does not fit {type(self.model).__name__}: {why}")


def is_sharded(module: nn.Module) -> TypeGuard[Any]:
    """Whether FSDP2 has made it, or it among others, a group of its own."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # which takes a while

    return isinstance(module, FSDPModule)


def _called(module: nn.Module, hidden: Tensor) -> Tensor:
    """What a part of the exit makes of hidden states, without FSDP2's hooks.

    They would gather its weights anew for every chunk of tokens, and processes whose chunks are not as
    many would wait for each other for ever.
    """
    return (module.forward if is_sharded(module) else module)(hidden)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, or the one inside a PEFT model.

    Raises:
        ValueError: for anything else.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"the recipe needs a causal LM of transformers, not {type(model).__name__}; "
            "attach it before the model is wrapped"
        )
    return inner


def find_model_parts(model: PreTrainedModel) -> ModelParts:
    """Find layers, final norm and head.

    Raises:
        ValueError: where one of them is not where decoders have it.
    """
    lookup: Any = model
    decoder, head = lookup.get_decoder(), lookup.get_output_embeddings()
    name = type(model).__name__
    if head is None or decoder is model:
        raise ValueError(f"the recipe needs a causal LM; {name} has no LM head")
    layers = next((m for n, m in _children(decoder, _LAYERS) if isinstance(m, nn.ModuleList)), None)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is None or len(layers) != count:
        raise ValueError(f"the recipe does not fit {name}: its list of {count} layers is not found")
    norm_name = next((n for n, _ in _children(decoder, _FINAL_NORMS)), None)
    if norm_name is None:
        raise ValueError(f"the recipe does not fit {name}: its final norm is not found")
    return ModelParts(model, layers, norm_name)


def _children(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    children = dict(module.named_children())
    return ((name, children[name]) for name in names if name in children)
