"""Tasks of lm-evaluation-harness for every way of decoding."""

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerskip.bench.bench import Metric, Row
from layerskip.bench.harness import HarnessModel, SharedScores
from layerskip.bench.quality import Progress
from layerskip.decoding import LayerSkipModel

BOOTSTRAP_SAMPLES = 1000  # for metrics whose standard error has no formula


def evaluate_tasks(
    model: LayerSkipModel,
    rows: Sequence[Row],
    tasks: Sequence[str],
    facts: dict[str, dict[str, Any]],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Run the harness's tasks for every row and write the figures into its `results`.

    Tasks that run generated code are refused, as the harness does by default.

    Args:
        model: needs a tokenizer.
        rows: ways of decoding.
        tasks: names or patterns ("mmlu_*").
        facts: is given, with the first row, how many documents and examples each task had.
        include_path: folder of further task files; where it has all tasks, no others are looked at.
        limit: documents a task.
        num_fewshot: examples before each question; None leaves it to the task.
        apply_chat_template: wrap prompts in the model's chat template.
        seed: of examples and of sampling.
        batch_size: rows a pass where likelihoods are computed.
        max_length: tokens of context; None takes the model's.
        progress: called after every batch.

    Raises:
        ValueError: no tokenizer or chat template, an unknown task, or data that cannot be had.
    """
    import lm_eval

    if model.tokenizer is None:
        raise ValueError("these tasks need a tokenizer, and this checkpoint has none")
    if apply_chat_template and not model.tokenizer.chat_template:
        raise ValueError("this checkpoint has no chat template")
    limit_length = model.decoder.architecture.max_context
    manager, names = _find(tasks, include_path)
    loaded = _load(manager, names, num_fewshot, seed)
    exits = {row.plan.final_exit(len(model.decoder.layers)) for row in rows}
    scores = SharedScores(model, exits, batch_size)
    found: dict[str, Any] = {}
    for row in rows:
        lm = HarnessModel(
            model,
            row,
            scores,
            max_length=min(max_length or limit_length, limit_length),
            seed=seed,
            progress=progress,
        )
        _sow(loaded, seed)
        found = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
        for task, figures in found["results"].items():
            better = found["higher_is_better"].get(task, {})
            if metrics := read_metrics(figures, better):
                row.results[task] = metrics
        for task, shots in found["n-shot"].items():
            documents = found["n-samples"].get(task, {}).get("effective")
            facts[task] = {"documents": documents, "num_fewshot": shots}


def _load(manager: Any, names: list[str], num_fewshot: int | None, seed: int) -> Any:
    """Tasks with their data; what a task fixes at no examples stays so, as the harness has it."""
    random.seed(seed)  # some tasks shuffle choices as they load
    np.random.seed(seed)
    try:
        loaded = manager.load(names)
    except OSError as error:
        raise ValueError(
            f"the data of a task cannot be had: {error}; without a network, give task files with"
            " local data by --include-path"
        ) from error
    except (TypeError, ValueError, KeyError) as error:  # as for a field that there is not
        raise ValueError(f"one of {', '.join(names)} cannot be loaded: {error}") from error
    unsafe = [name for name, task in loaded["tasks"].items() if task.get_config("unsafe_code")]
    if unsafe:
        raise ValueError(
            f"{', '.join(unsafe)} would run generated code; for HumanEval and MBPP there is"
            " `layerskip bench --allow-code-execution`"
        )
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
    return loaded


def _sow(loaded: Any, seed: int) -> None:
    """The same examples for every row."""
    random.seed(seed)
    np.random.seed(seed)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)


def read_metrics(
    figures: Mapping[str, Any], better: Mapping[str, bool | None]
) -> dict[str, Metric]:
    """The harness's "acc,none" and "acc_stderr,none" as one figure "acc"; other filters are named."""
    metrics = {}
    for key, value in figures.items():
        name, comma, kept_by = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{name}_stderr,{kept_by}")
        metrics[name if kept_by == "none" else key] = Metric(
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            better.get(name),
        )
    return metrics


def _find(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """A manager that knows the tasks, and their names."""
    own = None if include_path is None else os.fspath(include_path)
    from lm_eval.tasks import TaskManager

    # The harness's own files are thousands and take many seconds to read: only where they are needed.
    for with_defaults in (True,) if own is None else (False, True):
        manager = TaskManager(include_path=own, include_defaults=with_defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager, manager.match_tasks(list(tasks))
    raise ValueError(
        f"unknown tasks: {', '.join(unknown)}; `lm-eval ls tasks` lists what there is, and"
        " --include-path adds a folder of task files"
    )
