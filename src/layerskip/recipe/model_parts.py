"""The parts of a transformers causal LM that the recipe uses: decoder layers, final norm, LM head.

Also two decorators that keep torch.compile away from the recipe's own code. Compiled, that code
would be compiled anew for every layer, mask and step, until torch.compile gives up and runs
everything, layers included, in eager mode.
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
_disable: Any = torch.compiler.disable  # untyped in torch


def not_compiled(function: _Function) -> _Function:
    """Exclude a function and everything that it calls from torch.compile."""
    return _disable(function)


def compiled_below(function: _Function) -> _Function:
    """Exclude a function from torch.compile, but not what it calls."""
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

    # Norm and head are looked up at each use, because PEFT may replace them after `attach`.
    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self._decoder.get_submodule(self.norm_name)

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def is_balanced_mixture(self) -> bool:
        """True for a mixture of experts that is trained with a load balancing loss."""
        return bool(getattr(self.model.config, "output_router_logits", False))

    def routers(self, layer: nn.Module) -> list[tuple[nn.Module, int]]:
        """Routers of a layer, each with the index of its logits in its output."""
        recorders: Any = getattr(self._decoder, "_can_record_outputs", None) or {}
        recorders = recorders.get("router_logits") or []
        routers: list[tuple[nn.Module, int]] = []
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            router_class: Any = getattr(recorder, "target_class", recorder)
            index, path = getattr(recorder, "index", 0), getattr(recorder, "layer_name", None)
            within = f".{path.strip('.')}." if path else "."
            for name, module in layer.named_modules():
                if router_class and isinstance(module, router_class) and within in f".{name}.":
                    routers.append((module, index))
        return routers

    @property
    def has_logits_to_keep(self) -> bool:
        """True where the forward can be limited to the logits of some positions."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to hidden states."""
        return _call_unsharded(self.norm, hidden)

    def shared_exit(self, hidden: Tensor) -> Tensor:
        """Apply g: hidden states [N, D] that leave any layer -> the model's logits [N, V]."""
        logits = _call_unsharded(self.head, self.normed(hidden))
        if self.logits_factor != 1:
            logits = logits * self.logits_factor
        if cap := self.logits_cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def logits_factor(self) -> float:
        """Factor of the head's output (Cohere, Granite)."""
        config = self.model.config.get_text_config()
        divisor: float = getattr(config, "logits_scaling", None) or 1
        return (getattr(config, "logit_scale", None) or 1) / divisor

    @property
    def logits_cap(self) -> float | None:
        """Soft cap of the logits (Gemma 2), or None."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def exit_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the shared exit, unsharded where FSDP2 shards them.

        FSDP2 shards them again at the end of backward.
        """
        parts = (self.norm, self.head)
        for part in parts:
            if is_sharded(part):
                part.unshard()
            weight, parameters = getattr(part, "weight", None), list(part.parameters())
            is_view = isinstance(weight, Tensor) and weight.requires_grad
            is_view = is_view and not any(p.requires_grad for p in parameters)
            if is_view or any(hasattr(p, "ds_id") for p in parameters):
                self.refuse(
                    "final norm or head have no whole weights of their own, as in DeepSpeed ZeRO stage 3"
                    " and FSDP version 1: take stage 2, or FSDP2"
                )
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def probe_inputs(self) -> dict[str, Tensor]:
        """Return three rows of tokens: padded left, not padded, padded right.

        {} where the weights are not here: on the meta device, or sharded by DeepSpeed ZeRO-3.
        """
        weights = list(self.model.parameters())
        if any(p.is_meta or hasattr(p, "ds_id") for p in weights):
            return {}
        device = weights[0].device
        ids = torch.arange(15, device=device).reshape(3, 5) % self.vocab_size
        mask = torch.ones_like(ids)
        mask[0, 0] = mask[2, 4] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Enter `evaluating`, with PyTorch's attention in place of flash attention.

        Flash attention needs a GPU and float16 or bfloat16, which in training autocast provides.
        """
        implementation = self.model.config._attn_implementation
        is_flash = isinstance(implementation, str) and "flash" in implementation
        if is_flash:
            has_sdpa = self.model._supports_sdpa  # Gemma 2 has not
            self.model.set_attn_implementation("sdpa" if has_sdpa else "eager")
        try:
            with self.evaluating():
                yield
        finally:
            if is_flash:
                self.model.set_attn_implementation(implementation)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode without gradients, and restore each module's mode afterwards."""
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
    """Return True where FSDP2 shards the module as a unit."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return isinstance(module, FSDPModule)


def _call_unsharded(module: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a part of the exit without FSDP2's hooks.

    The hooks would gather its weights for every chunk of tokens, and processes with different
    numbers of chunks would deadlock.
    """
    output: Tensor = (module.forward if is_sharded(module) else module)(hidden)
    return output


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model itself, or the one inside a PEFT model.

    Raises:
        ValueError: for anything else.
    """
    unwrap: Callable[[], object] | None = getattr(model, "get_base_model", None)
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
    decoder, head = model.get_decoder(), model.get_output_embeddings()
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
