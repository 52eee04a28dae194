"""Early-exit view of a vLLM model: its first layers, final norm and head, with no weight twice.

Exit adapters are not supported here. One would be a layer of the view behind the first E, with a KV
cache layer of its own: registered in `early_exit_view`, allocated in `LayerSkipProposer.load_model`.
"""

import copy
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, VllmConfig, replace, set_current_vllm_config

_TAG = "layerskip_draft"


def early_exit_view(
    target: nn.Module, exit_layer: int, vllm_config: VllmConfig, *, enforce_eager: bool
) -> nn.Module:
    """Return a copy of the model whose decoder ends after `exit_layer` layers.

    The modules and parameters are the target's own. vLLM's decoders loop over
    `layers[start_layer:end_layer]`, for pipeline parallelism; the copy has another `end_layer`.

    Args:
        target: A causal language model of vLLM, with its decoder in `target.model`.
        exit_layer: Number of layers to run.
        vllm_config: The configuration of the run.
        enforce_eager: Run the view without torch.compile, whatever the target does.

    Raises:
        ValueError: The decoder has another structure.
    """
    decoder = decoder_of(target)
    view_decoder = _shallow_copy(decoder)
    view_decoder.end_layer = exit_layer
    view_decoder.aux_hidden_state_layers = ()
    if not getattr(decoder, "do_not_compile", True):
        compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        if compiled and not enforce_eager:
            _compile_anew(view_decoder, exit_layer, vllm_config)
        else:
            view_decoder.do_not_compile = True
    view = _shallow_copy(target)
    view._modules["model"] = view_decoder
    return view


def decoder_of(target: nn.Module) -> Any:
    """Return the model's decoder, after checking that its forward pass can end early."""
    decoder: Any = getattr(target, "model", None)
    attributes = ("layers", "start_layer", "end_layer", "norm")
    if not all(hasattr(decoder, name) for name in attributes):
        raise ValueError(
            f"layerskip: {type(target).__name__} is not supported: its `model` lacks one of"
            f" {', '.join(attributes)}"
        )
    # A forward pass that ignored `end_layer` would run all layers: right drafts, and no gain.
    if "end_layer" not in type(decoder).forward.__code__.co_names:
        raise ValueError(
            f"layerskip: {type(decoder).__name__} is not supported: its forward pass does not end at"
            " `end_layer`"
        )
    return decoder


def _compile_anew(decoder: Any, exit_layer: int, vllm_config: VllmConfig) -> None:
    """Give the copied decoder a torch.compile state of its own."""
    decoder.__dict__.pop("aot_compiled_fn", None)
    # vLLM's cache of compiled graphs is keyed by the configuration and the name of the forward
    # method. With the same configuration, the view could get the target's graph of all layers.
    config = replace(
        vllm_config,
        additional_config={**vllm_config.additional_config, _TAG: exit_layer},
    )
    decoder.compilation_config = config.compilation_config
    decoder.was_aot_compile_fn_loaded_from_disk = False
    decoder._compile_tag = _TAG
    with set_current_vllm_config(config), set_model_tag(_TAG):
        TorchCompileWithNoGuardsWrapper.__init__(decoder, compile_prefix="", is_encoder=False)


def _shallow_copy(module: nn.Module) -> Any:
    """Copy a module, so that submodules are shared but can be replaced in the copy alone."""
    twin = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[name] = dict(getattr(module, name))
    return twin
