"""lm-evaluation-harness over every way of decoding, through its public interface `LM`."""

import functools
import hashlib
import os
import random
from array import array
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerskip.bench.bench import Metric, Row
from layerskip.bench.perplexity import prefix_token, windows
from layerskip.bench.quality import Passage, Progress, Score, score_passages
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.decoding.sampling import nth_seed
from layerskip.model.chat_template import render_chat

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        f"tasks of lm-evaluation-harness need it: pip install 'layerskip[eval]' ({error})"
    ) from error

DEFAULT_NEW_TOKENS = 256  # the harness's own default where a task says nothing
BOOTSTRAP_SAMPLES = 1000  # for metrics whose standard error has no formula
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class SharedScores:
    """Caches scores of passages at all exits: every exit's LM requests the same ones."""

    def __init__(self, model: LayerSkipModel, exits: Collection[int], batch_size: int) -> None:
        self._model, self._exits, self._batch_size = model, exits, batch_size
        self._known: dict[tuple[bytes, int], dict[int, Score]] = {}

    def at(self, exit_layer: int, passages: Sequence[Passage], progress: Progress) -> list[Score]:
        """Return the scores of one exit, in the order of the passages."""
        keys = [_key(passage) for passage in passages]
        unknown = {k: p for k, p in zip(keys, passages, strict=True) if k not in self._known}
        what = f"likelihoods at {len(self._exits)} exits"
        scores = score_passages(
            self._model.decoder,
            list(unknown.values()),
            self._exits,
            batch_size=self._batch_size,
            progress=lambda done, total: progress(what, done, total),
        )
        self._known.update(zip(unknown, scores, strict=True))
        return [self._known[key][exit_layer] for key in keys]


def _key(passage: Passage) -> tuple[bytes, int]:
    """Return a digest of a passage: tasks have millions of tokens, which are not to be kept twice."""
    tokens = array("q", passage.tokens).tobytes()
    return hashlib.blake2b(tokens, digest_size=16).digest(), passage.scored


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model in one way of decoding, as the harness sees it.

    Likelihoods are those of the layers that decide the tokens; answers are decoded by the row's config.

    Args:
        model: has a tokenizer.
        row: collects drafted and accepted tokens over the answers.
        scores: shared by all rows.
        max_length: tokens of context.
        seed: of sampling.
        progress: called after every batch or answer.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        row: Row,
        scores: SharedScores,
        *,
        max_length: int,
        seed: int,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self.row = row
        self._model, self._scores, self._progress = model, scores, progress
        self._max_length, self._seed = max_length, seed
        self._exit = row.config.num_layers_to_run(len(model.decoder.layers))

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        token = prefix_token(self.tokenizer)
        if token is None:
            raise ValueError(
                "a text without context needs a begin or end token, and this tokenizer names none"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """Name of the harness's cache of requests."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return token ids; a text that begins with the prefix token gets no second one."""
        if add_special_tokens is None:
            token = prefix_token(self.tokenizer)
            prefix = None if token is None else self.tokenizer.decode([token])
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the chat template; system messages are left out where it does not support them."""
        render = functools.partial(
            render_chat,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except ValueError:  # as the harness itself does
            return render([message for message in chat_history if message["role"] != "system"])

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is the greedy continuation) of continuations after contexts."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # A continuation's last token is predicted but not read, so max_length + 1 tokens fit.
        passages = [
            _passage((context + continuation)[-self._max_length - 1 :], len(continuation))
            for _, context, continuation in requests
        ]
        scores = self._scores.at(self._exit, passages, self._progress)
        return [
            (score.log_likelihood, score.hits == passage.scored)
            for score, passage in zip(scores, passages, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log-likelihoods of whole texts, in windows of max_length tokens."""
        length = self._max_length
        streams = ([self.prefix_token_id, *self.tok_encode(r.args[0])] for r in requests)
        texts = [list(windows(stream, length, length)) for stream in streams]
        flat = [passage for passages in texts for passage in passages]
        scores = iter(self._scores.at(self._exit, flat, self._progress))
        return [sum(next(scores).log_likelihood for _ in passages) for passages in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return answers, decoded one after the other by the row's config."""
        texts = []
        for i, request in enumerate(requests):
            context, generation_kwargs = request.args
            options = generation_options(generation_kwargs)
            limit = self._max_length - options["max_new_tokens"]
            if limit < 1:
                raise ValueError(
                    f"a task asks for {options['max_new_tokens']} new tokens, which leaves no room"
                    f" for a prompt in a context of {self._max_length}"
                )
            generation = self._model.generate(
                self.tok_encode(context)[-limit:],
                self.row.config,
                **options,
                seed=nth_seed(self._seed, i),
            )
            self.row.drafted += generation.drafted
            self.row.accepted += generation.accepted
            texts.append(generation.text)
            self._progress(f"answers, {describe(self.row.config)}", i + 1, len(requests))
        return texts


def _passage(tokens: Sequence[int], scored: int) -> Passage:
    return Passage(tuple(tokens), min(scored, len(tokens) - 1))


def describe(config: DecodingConfig) -> str:
    """Return a short name of a config, such as "early-exit, E=8"."""
    parts = {"E": config.exit_layer, "d": config.draft_tokens}
    return ", ".join([config.mode, *(f"{k}={v}" for k, v in parts.items() if v is not None)])


def generation_options(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task's `generation_kwargs` to options of `DecodingConfig`.

    Raises:
        ValueError: an option is not supported, such as beams.
    """
    remaining = dict(generation_kwargs)
    lengths = [n for name in _LENGTH_NAMES if (n := remaining.pop(name, None)) is not None]
    until = remaining.pop("until", None) or []
    sampled, temperature = remaining.pop("do_sample", None), remaining.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    options: dict[str, Any] = {
        "max_new_tokens": int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": 0.0 if sampled is False else float(temperature),
        "repetition_penalty": float(remaining.pop("repetition_penalty", 1.0)),
    }
    for name in ("top_k", "top_p", "min_p"):
        value = remaining.pop(name, None)
        options[name] = value if value and options["temperature"] > 0 else None
    unknown = {
        k: v for k, v in remaining.items() if (k, v) not in (("num_beams", 1), ("use_cache", True))
    }
    if unknown:
        raise ValueError(
            f"a task asks for generation with {', '.join(f'{k}={v}' for k, v in unknown.items())},"
            " which layerskip does not have"
        )
    return options


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
    """Run the harness's tasks for every row and add the figures to its `results`.

    Tasks that run generated code are refused, as the harness does by default.

    Args:
        model: needs a tokenizer.
        rows: ways of decoding.
        tasks: names or patterns ("mmlu_*").
        facts: receives the number of documents and examples of each task.
        include_path: folder of further task files; where it has all tasks, no others are read.
        limit: documents a task.
        num_fewshot: examples before each question; None = the task's own.
        apply_chat_template: wrap prompts in the model's chat template.
        seed: of examples and of sampling.
        batch_size: rows a pass where likelihoods are computed.
        max_length: tokens of context; None = the model's.
        progress: called after every batch.

    Raises:
        ValueError: no tokenizer or chat template, an unknown task, or data that are not available.
    """
    import lm_eval

    if model.tokenizer is None:
        raise ValueError("these tasks need a tokenizer, and this checkpoint has none")
    if apply_chat_template and not model.tokenizer.chat_template:
        raise ValueError("this checkpoint has no chat template")
    limit_length = model.decoder.architecture.max_context
    manager, names = _find(tasks, include_path)
    loaded = _load(manager, names, num_fewshot, seed)
    exits = {row.config.num_layers_to_run(len(model.decoder.layers)) for row in rows}
    scores = SharedScores(model, exits, batch_size)
    results: dict[str, Any] = {}
    for row in rows:
        lm = HarnessModel(
            model,
            row,
            scores,
            max_length=min(max_length or limit_length, limit_length),
            seed=seed,
            progress=progress,
        )
        _set_seeds(loaded, seed)
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
        for task, figures in results["results"].items():
            better = results["higher_is_better"].get(task, {})
            if metrics := read_metrics(figures, better):
                row.results[task] = metrics
        for task, shots in results["n-shot"].items():
            documents = results["n-samples"].get(task, {}).get("effective")
            facts[task] = {"documents": documents, "num_fewshot": shots}


def _load(manager: Any, names: list[str], num_fewshot: int | None, seed: int) -> Any:
    """Load tasks with their data; a task that fixes 0 examples keeps them, as in the harness."""
    random.seed(seed)  # some tasks shuffle choices as they load
    np.random.seed(seed)
    try:
        loaded = manager.load(names)
    except OSError as error:
        raise ValueError(
            f"the data of a task are not available: {error}; without a network, give task files with"
            " local data by --include-path"
        ) from error
    except (TypeError, ValueError, KeyError) as error:  # a missing field, for example
        raise ValueError(f"one of {', '.join(names)} cannot be loaded: {error}") from error
    unsafe = [name for name, task in loaded["tasks"].items() if task.get_config("unsafe_code")]
    if unsafe:
        raise ValueError(
            f"{', '.join(unsafe)} would run generated code; for HumanEval and MBPP there is"
            " `layerskip bench --allow-code-execution`"
        )
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
    return loaded


def _set_seeds(loaded: Any, seed: int) -> None:
    """Choose the same examples for every row."""
    random.seed(seed)
    np.random.seed(seed)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)


def read_metrics(
    figures: Mapping[str, Any], better: Mapping[str, bool | None]
) -> dict[str, Metric]:
    """Join "acc,none" and "acc_stderr,none" to one metric "acc"; other filters are part of the name."""
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
    task_folder = None if include_path is None else os.fspath(include_path)
    from lm_eval.tasks import TaskManager

    # The harness's own files are thousands and take many seconds to read: only where they are needed.
    for with_defaults in (True,) if task_folder is None else (False, True):
        manager = TaskManager(include_path=task_folder, include_defaults=with_defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager, manager.match_tasks(list(tasks))
    raise ValueError(
        f"unknown tasks: {', '.join(unknown)}; `lm-eval ls tasks` lists what there is, and"
        " --include-path adds a folder of task files"
    )
