"""The changes to vLLM, made once a process.

1. `EngineArgs.create_speculative_config` translates {"method": "layerskip"} (see `config`).
2. `VllmConfig._get_v2_model_runner_unsupported_features` names the method, so that vLLM takes model
   runner V1: there is no speculator for V2 yet.
3. `DraftModelProposer(...)` makes a `LayerSkipProposer` where the configuration asks for one.

All three test the run's configuration first; a run with another method takes vLLM's own code.
"""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from layerskip.vllm_plugin.config import METHOD, settings_of, translate

_PROPOSER_MODULE = "vllm.v1.spec_decode.draft_model"
_INSTALLED = "_layerskip_installed"


def install() -> None:
    """Change the classes named above, unless this process has done so already."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _INSTALLED, False):
        return
    create = EngineArgs.create_speculative_config
    unsupported = VllmConfig._get_v2_model_runner_unsupported_features

    @functools.wraps(create)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        translate(self, target_model_config, target_parallel_config)
        return create(self, target_model_config, target_parallel_config)

    @functools.wraps(unsupported)
    def unsupported_by_v2(self: Any) -> list[str]:
        features: list[str] = unsupported(self)
        if settings_of(self) is not None:
            features.append(f"speculative method '{METHOD}'")
        return features

    EngineArgs.create_speculative_config = create_speculative_config
    VllmConfig._get_v2_model_runner_unsupported_features = unsupported_by_v2
    _after_import(_PROPOSER_MODULE, _change_proposer)
    setattr(EngineArgs, _INSTALLED, True)


def _change_proposer(module: ModuleType) -> None:
    base = module.DraftModelProposer

    def new(cls: type, vllm_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cls is base and settings_of(vllm_config) is not None:
            from layerskip.vllm_plugin.proposer import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    base.__new__ = new


def _after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change(module)` as soon as `name` is imported.

    Importing it here would cost every vLLM front end 1.5 s, and may touch the GPU before vLLM forks.
    """
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ChangeOnImport(name, change))


class _ChangeOnImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
