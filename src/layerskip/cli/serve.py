"""`layerskip serve`: an OpenAI-compatible server with a chat page."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click

from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    config_from_flags,
    config_options,
    debug_option,
)
from layerskip.cli.output import log_stderr
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.serve.config import ServeConfig
from layerskip.serve.engine import Engine

_MODEL = "smollm2-135m"
_TEMPERATURE = 1.0  # OpenAI's default
# Requests name the others.
_DEFAULTS = (
    *("mode", "exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary"),
    *("datastore", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty"),
)


@click.command("serve")
@config_options(ServeConfig)
@config_options(ModelConfig, model=_MODEL)
@config_options(DecodingConfig, only=_DEFAULTS, temperature=_TEMPERATURE)
@debug_option
def command(**flags: Any) -> None:
    """Serve a model to any client of OpenAI's API, with a chat page.

    The flags of decoding are the defaults of requests that do not name these options. SIGTERM and
    Ctrl-C let running answers finish; a second one ends at once.

    \b
    Examples:
      layerskip serve
      layerskip serve --model Qwen/Qwen3-0.6B --weights int8 --port 8080
      LAYERSKIP_API_KEY=secret layerskip serve --host 0.0.0.0
    """
    if flags["api_key"] is None:
        flags["api_key"] = os.environ.get("LAYERSKIP_API_KEY") or None
    config = config_from_flags(ServeConfig, flags)
    model_config = config_from_flags(ModelConfig, flags, model=_MODEL)
    decoding = config_from_flags(DecodingConfig, flags, temperature=_TEMPERATURE)
    path = Path(model_config.model)
    name = config.served_model_name or (path.resolve().name if path.exists() else str(path))
    try:
        from layerskip.serve.server import Server, listen, make_engine
        from layerskip.serve.service import Service
    except ModuleNotFoundError as error:
        raise ImportError(
            f"layerskip serve needs {error.name}; run: pip install 'layerskip[serve]'"
        ) from error
    listener = listen(config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    service = Service(name, config, decoding, log_stderr)
    context = click.get_current_context()

    def load() -> tuple[LayerSkipModel, Engine]:
        with context.scope(cleanup=False):  # this is another thread
            model = config_flags.load_model(model_config)
        model.resolve(decoding)  # reports what does not fit the model
        return model, make_engine(model, config)

    def ready() -> None:
        print(f"{name} is ready: {address}", flush=True)
        print(_curl(address, config, service.model), flush=True)

    Server(service, load, ready).run_on(listener)


def _curl(address: str, config: ServeConfig, model: LayerSkipModel) -> str:
    """Return a command that gets an answer."""
    key = ' -H "Authorization: Bearer $LAYERSKIP_API_KEY"' if config.api_key else ""
    path, prompt = "completions", dict[str, Any](prompt="Once upon a time")
    if (form := model.settings.prompt_form) is not None:  # trained on a task, not on chats
        prompt = {"prompt": form.example, "max_tokens": 64, "temperature": 0}
    elif model.has_chat_template:
        path, prompt = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    body = shlex.quote(json.dumps(prompt))
    return f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d {body}"
