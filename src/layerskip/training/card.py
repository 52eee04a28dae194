"""Model card of a training run: README.md, with the header that the Hugging Face hub reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip.data.readers import local_files
from layerskip.model.publish import Origin, card_header, origin_of, public_name
from layerskip.training.config import TrainConfig

_PAPER = "https://arxiv.org/abs/2404.16710"
_OF_THE_MACHINE = (
    *("model", "tokenizer", "data", "eval_data", "output", "resume", "push_to_hub", "private"),
    *("device", "threads", "log_steps", "save_steps", "keep_checkpoints"),
)


def model_card(
    config: TrainConfig,
    *,
    exit_layer: int,
    num_layers: int,
    steps: int,
    metrics: Mapping[str, float],
    can_exit: bool,
) -> str:
    """Return the model card of a result, without paths of this machine.

    Args:
        config: the settings.
        exit_layer: exit that drafts.
        num_layers: of the model.
        steps: optimizer steps done.
        metrics: of the last evaluation: `eval_loss_exit_E`, `eval_accuracy_exit_E`.
        can_exit: True where transformers can draft with this model.
    """
    name = (config.push_to_hub or Path(config.output).resolve().name).rpartition("/")[2]
    origin = Origin() if config.from_scratch else origin_of(config.model)
    data, evaluation = public_name(config.data), _evaluation(metrics)
    header = card_header(
        origin,
        datasets=None if local_files(config.data) else [config.data],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layerskip", "early-exit", "self-speculative-decoding"],
        metrics=["accuracy"] if evaluation else None,
        model_name=name,
        eval_results=_results(evaluation, config, exit_layer),
    )
    base = origin.hub_id or ("Random weights" if config.from_scratch else public_name(config.model))
    sections = [
        header,
        f"# {name}",
        f"{base}, trained on {data} with layer dropout and early exit loss ([LayerSkip]({_PAPER})), so"
        f" that its first {exit_layer} layers draft what all {num_layers} layers verify.",
    ]
    if config.prompt_form is not None:
        sections.append(
            f"It is for prompts of one form: {config.prompt_form}. An example:"
            f" {_code(config.prompt_example)}."
        )
    sections += ["## Use", _use(config.push_to_hub or ".", can_exit)]
    if evaluation:
        rows = [
            f"| {exit_} | {loss:.3f} | {accuracy:.1%} |" for exit_, loss, accuracy in evaluation
        ]
        sections += [
            "## Evaluation",
            f"Loss and token accuracy of exits, on {_evaluated_on(config)}:",
            "\n".join(["| layers | loss | token accuracy |", "|---|---|---|", *rows]),
        ]
    settings = config.as_flat_dict()
    rows = [
        f"| `{setting}` | {_code(value)} |"
        for setting, value in settings.items()
        if value is not None and setting not in _OF_THE_MACHINE
    ]
    sections += [
        "## Training",
        f"`layerskip train`, {steps:,} optimizer steps:",
        "\n".join(["| setting | value |", "|---|---|", *rows]),
    ]
    return "\n\n".join(sections) + "\n"


def _use(name: str, can_exit: bool) -> str:
    text = f'```\nlayerskip generate --model {name} --prompt "..."\n```'
    if can_exit:
        text += f"""

In transformers, `generate` drafts with the exit that `generation_config.json` names:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
outputs = model.generate(**tokenizer("...", return_tensors="pt"), do_sample=False)
```"""
    return text


def _evaluation(metrics: Mapping[str, float]) -> list[tuple[int, float, float]]:
    """Return exit, loss and token accuracy of each exit that was evaluated, ascending."""
    prefix = "eval_loss_exit_"
    exits = sorted(int(n.removeprefix(prefix)) for n in metrics if n.startswith(prefix))
    rows = [(e, metrics[f"{prefix}{e}"], metrics[f"eval_accuracy_exit_{e}"]) for e in exits]
    return [row for row in rows if all(map(math.isfinite, row))]


def _results(
    evaluation: list[tuple[int, float, float]], config: TrainConfig, exit_layer: int
) -> Any:
    """Return the results of the header: token accuracy of the exit that drafts, and of all layers."""
    from huggingface_hub import EvalResult

    source = config.eval_data or config.data
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="local" if local_files(source) else source,
            dataset_name=public_name(source),
            metric_type="accuracy",
            metric_name=f"token accuracy, {exit_} layers",
            metric_value=round(accuracy, 4),
        )
        for exit_, _, accuracy in evaluation
        if exit_ in (exit_layer, evaluation[-1][0])
    ]


def _evaluated_on(config: TrainConfig) -> str:
    if config.eval_data is not None:
        return public_name(config.eval_data)
    return f"{config.eval_rows} held-out rows of {public_name(config.data)}"


def _code(value: Any) -> str:
    """Return a value as JSON for a cell of a table."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")
