"""Configuration of the method: its settings, their defaults in the checkpoint, and what is refused."""

from typing import Any

METHOD = "layerskip"
TESTED_VERSIONS = ((0, 32), (0, 34))
"""The first vLLM release in the tested range, and the first one behind it."""

_DEFAULTS = {"exit_layer": "assistant_early_exit", "num_speculative_tokens": "num_assistant_tokens"}
"""Settings, and the fields of generation_config.json that they default to."""

_SETTINGS = {
    "method",
    *_DEFAULTS,
    "draft_vocab_size",
    "num_speculative_tokens_per_batch_size",
    "draft_sample_method",
    "rejection_sample_method",
    "enforce_eager",
}


def settings_of(vllm_config: Any) -> dict[str, Any] | None:
    """Return the method's settings in a vLLM run, or None if its method is another one."""
    additional = getattr(vllm_config, "additional_config", None)
    return additional.get(METHOD) if isinstance(additional, dict) else None


def draft_token_ids(model_config: Any, draft_vocab_size: int | None) -> list[int] | None:
    """Return the tokens that the checkpoint lists for drafts, the most useful first.

    Args:
        model_config: The target's configuration.
        draft_vocab_size: The largest number to return; None for all, 0 for no list.

    Returns:
        Token ids of the model's vocabulary, or None for all of it.
    """
    fields = _generation_config(model_config).get(METHOD)
    text = fields.get("draft_vocabulary") if isinstance(fields, dict) else None
    if not isinstance(text, str) or draft_vocab_size == 0:
        return None
    vocab_size = model_config.get_vocab_size()
    token_ids = [int(token) for token in text.split() if token.isdigit()]
    return [token for token in token_ids if token < vocab_size][:draft_vocab_size] or None


def translate(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Replace the method "layerskip" in `engine_args` by one that vLLM knows; leave others alone.

    The method becomes "draft_model" with the target as its draft model, since this is what makes the
    scheduler reserve KV slots for the drafted tokens. What is left of the settings travels in
    `additional_config`, which vLLM hands to every worker.

    Raises:
        ValueError: The settings are not valid, or the run uses a feature that is not supported.
    """
    settings = engine_args.speculative_config
    if not isinstance(settings, dict) or settings.get("method") != METHOD:
        return
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    _refuse_unsupported(engine_args, parallel_config)
    unknown = sorted(settings.keys() - _SETTINGS)
    if unknown:
        raise ValueError(
            f"{METHOD}: unknown settings in speculative_config: {', '.join(unknown)};"
            f" the method takes {', '.join(sorted(_SETTINGS))}"
        )
    by_batch_size = settings.get("num_speculative_tokens_per_batch_size")
    if by_batch_size:
        settings.setdefault("num_speculative_tokens", max(entry[2] for entry in by_batch_size))
    _set_defaults(settings, engine_args, model_config)
    exit_layer = settings.pop("exit_layer")
    num_layers = model_config.hf_text_config.num_hidden_layers
    if not 0 < exit_layer < num_layers:
        raise ValueError(
            f"{METHOD}: exit_layer must be in 1..{num_layers - 1} for this model, got {exit_layer}"
        )
    draft_vocab_size = settings.pop("draft_vocab_size", None)
    if draft_vocab_size is not None and not _is_integer(draft_vocab_size, at_least=0):
        raise ValueError(
            f"{METHOD}: draft_vocab_size must be a number of tokens, or 0 for all, got"
            f" {draft_vocab_size!r}"
        )
    engine_args.speculative_config = settings | {
        "method": "draft_model",
        "model": model_config.model,
        "revision": model_config.revision,
    }
    engine_args.additional_config = (engine_args.additional_config or {}) | {
        METHOD: {"exit_layer": exit_layer, "draft_vocab_size": draft_vocab_size}
    }


def _set_defaults(settings: dict[str, Any], engine_args: Any, model_config: Any) -> None:
    names = [name for name in _DEFAULTS if name not in settings]
    if engine_args.spec_tokens is not None and "num_speculative_tokens" in names:
        names.remove("num_speculative_tokens")  # vLLM takes it from --spec-tokens
    if names:
        generation = _generation_config(model_config)
        settings |= {name: generation.get(_DEFAULTS[name]) for name in names}
    for name, field in _DEFAULTS.items():
        value = settings.get(name, 1)
        if not _is_integer(value, at_least=1):
            hint = f"; the checkpoint's generation_config.json has no {field}: give {name}"
            raise ValueError(
                f"{METHOD}: {name} must be a positive integer, got {value!r}"
                + (hint if name in names else "")
            )


def _generation_config(model_config: Any) -> dict[str, Any]:
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    file = "generation_config.json"
    fields: dict[str, Any] | None = get_hf_file_to_dict(
        file, model_config.model, model_config.revision
    )
    return fields or {}


def _is_integer(value: Any, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _refuse_unsupported(engine_args: Any, parallel_config: Any) -> None:
    import vllm
    from packaging.version import Version

    first, behind = TESTED_VERSIONS
    context_parallel = max(
        parallel_config.decode_context_parallel_size, parallel_config.prefill_context_parallel_size
    )
    additional = engine_args.additional_config
    refusals = [
        (
            not first <= Version(vllm.__version__).release[:2] < behind,
            f"vLLM {vllm.__version__} is outside the tested range"
            f" >={_dotted(first)},<{_dotted(behind)}: install a version inside it",
        ),
        (
            parallel_config.pipeline_parallel_size > 1,
            "no pipeline parallelism, which parts the exit layer from the head: use tensor parallelism",
        ),
        (context_parallel > 1, "no context parallelism: use tensor parallelism"),
        (engine_args.enable_lora, "no LoRA, which drafts do not apply: leave out --enable-lora"),
        (
            engine_args.kv_transfer_config is not None,
            "no KV connector: leave out --kv-transfer-config",
        ),
        (parallel_config.enable_eplb, "no expert load balancing: leave out --enable-eplb"),
        (
            additional is not None and not isinstance(additional, dict),
            "additional_config must be a dict, since the exit layer travels in it",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise ValueError(f"{METHOD}: {reason}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
