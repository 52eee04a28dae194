"""Ablation of the hand-set constants of `decoding/`: tokens per unit of cost in mode auto.

Each constant is changed to a smaller and a larger value, one at a time. The model's greedy answers are
computed once and the early exit's proposal once for each context; rounds are replayed from these. Drafts
are decided with the changed constant, and costs are counted with the controller's own cost table and
the defaults. So the figures depend on the answers alone and not on the machine's load: they are
predicted speedups over plain decoding. Columns: tasks, prompt by prompt; `gpu`, the last task with the
cost table of a GPU; `prediction`, the last task with predicted outputs, one word in ten of them wrong;
`datastore`, the first task with a datastore of right answers to other prompts.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import deliver, environment_of, parse, run
from edits import partly_right

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding import config, controller, datastore, drafters
from layerskip.decoding.config import DecodingConfig
from layerskip.decoding.controller import ContextCosts, DraftController
from layerskip.decoding.drafters import (
    Candidate,
    DatastoreLookup,
    Draft,
    EarlyExit,
    Ngram,
    Prediction,
)
from layerskip.decoding.sampling import Sampler
from layerskip.model.hub import TRAINED_MODEL

# Constant -> (modules that read it, a smaller and a larger value).
VALUES: dict[str, tuple[tuple[ModuleType, ...], tuple[Any, Any]]] = {
    "PRIOR_WEIGHT": ((controller,), (1.0, 10.0)),
    "EXIT_ACCEPTANCE": ((controller,), (0.5, 0.9)),
    "EXIT_ACCEPTANCE_WEIGHT": ((controller,), (0.5, 8.0)),
    "MEMORY": ((controller,), (0.8, 0.99)),
    "PLAIN_ROUNDS": ((controller,), (1.0, 16.0)),
    "BACKOFF_ROUNDS": ((controller,), (0, 4)),
    "MAX_BACKOFF_ROUNDS": ((controller,), (4, 128)),
    "LOOKAHEAD": ((controller,), (0, 2)),
    "CONFIDENCE_BINS": ((controller,), (4, 20)),
    "_ATTENTION_ROW": ((controller,), (0.1, 1.0)),
    "_GPU_ROW_COST": ((controller,), (0.001, 0.1)),
    "MAX_ADAPTIVE_DRAFT_TOKENS": ((config,), (6, 24)),
    "_NGRAM_CONFIDENCE": (
        (drafters,),
        ((0.1, 0.2, 0.25, 0.3, 0.35, 0.4), (0.6, 0.8, 0.85, 0.9, 0.95, 0.95)),
    ),
    "_PREDICTION_CONFIDENCE": (
        (drafters,),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.8, 0.85, 0.9, 0.95, 0.95, 0.95)),
    ),
    "_SHARE_POWER": ((drafters,), (1.0, 3.0)),
    "_MAX_POSITIONS": ((drafters,), (1, 128)),
    "MAX_MATCH": ((drafters, datastore), (3, 8)),
    "_MIN_SHARE": ((datastore,), (0.02, 0.4)),
}
DEFAULTS = {name: getattr(modules[0], name) for name, (modules, _) in VALUES.items()}
DATASTORE_ANSWERS = 1000
OF_COSTS = ("_ATTENTION_ROW", "_GPU_ROW_COST")
OF_TABLES = ("MAX_MATCH", "_MIN_SHARE")


@contextlib.contextmanager
def replaced(**values: Any) -> Iterator[None]:
    """Set constants in all modules that read them."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            for module in VALUES[name][0]:
                stack.enter_context(mock.patch.object(module, name, value))
        yield


class RecordedExit:
    """The early exit of greedy decoding, whose proposals are computed once for each context."""

    name = EarlyExit.name
    prior = None

    def __init__(self, model: LayerSkipModel, plan: DecodingConfig) -> None:
        assert plan.exit_layer is not None
        self._decoder, self._plan, self.num_layers = model.decoder, plan, plan.exit_layer
        self._of_prompts: dict[Any, dict[tuple[int, ...], tuple[int, float]]] = {}
        self.contexts: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin with new prompts, whose tokens a reduced-vocabulary head has."""
        ids = self._plan.draft_vocabulary
        tokens = [token for prompt in prompts for token in prompt]
        head = drafters.ReducedHead.of(self._decoder, ids, tokens)  # type: ignore[arg-type]
        self.head_share = 1.0 if head is None else head.share
        sampler = Sampler(self._plan, self._decoder.device)
        self._exit = EarlyExit(self._decoder, self.num_layers, sampler, head, with_confidence=True)
        self._recorded = self._of_prompts.setdefault(tuple(map(tuple, prompts)), {})

    def update(self, tokens: Sequence[int]) -> None:
        """Do nothing: the replay keeps the contexts."""

    def propose(self, draft: Draft, max_tokens: int) -> Candidate:
        """See `Drafter`."""
        rows = [*map(list, draft.tokens.tolist())]
        contexts = [tuple(context + row) for context, row in zip(self.contexts, rows, strict=True)]
        found = [self._recorded.get(context) or self._compute(context) for context in contexts]
        tokens = torch.tensor([[token] for token, _ in found])
        return Candidate(tokens, [found[0][1]])

    @torch.inference_mode()
    def _compute(self, context: tuple[int, ...]) -> tuple[int, float]:
        decoder = self._decoder
        cache = decoder.new_cache(len(context))
        for chunk in torch.tensor([context[:-1]]).split(512, dim=1):
            decoder.run(decoder.embed(chunk), 0, self.num_layers, cache)
            cache.lengths += chunk.shape[1]
        candidate = self._exit.propose(Draft(torch.tensor([context[-1:]]), cache), 1)
        self._recorded[context] = candidate.token_ids[0], float(candidate.confidences[0])
        return self._recorded[context]


class Replay:
    """Greedy answers of a model in mode auto, and the cost of the rounds that would draft them.

    Args:
        model: with an early exit; costs that `layerskip tune` has measured are left out.
        prompts: token ids of each task.
        max_new_tokens: of an answer.
        datastore: token ids of texts like the answers of the first task.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        prompts: dict[str, list[list[int]]],
        max_new_tokens: int,
        datastore: tuple[int, ...],
    ) -> None:
        self._model, self._datastore = model, datastore
        self._exit = RecordedExit(model, model.resolve(mode="auto"))
        self._pairs = {
            task: [
                (prompt, model.generate(prompt, mode="plain", max_new_tokens=max_new_tokens))
                for prompt in some
            ]
            for task, some in prompts.items()
        }

    def speedups(self) -> dict[str, float]:
        """Return the predicted speedup of each column with the constants as they are."""
        result = {task: self._one_by_one(pairs) for task, pairs in self._pairs.items()}
        first, *_ = self._pairs.values()
        *_, last = self._pairs.values()
        with mock.patch.object(controller, "_machine_costs", _gpu_costs):
            result["gpu"] = self._one_by_one(last)
        result["prediction"] = self._one_by_one(last, with_predictions=True)
        result["datastore"] = self._one_by_one(first, text=self._datastore)
        return result

    def _costs(self) -> ContextCosts:
        exit_ = self._exit
        return ContextCosts(self._model.decoder, exit_.num_layers, exit_.head_share, None)

    def _one_by_one(
        self,
        pairs: Sequence[tuple[list[int], Any]],
        *,
        with_predictions: bool = False,
        text: tuple[int, ...] = (),
    ) -> float:
        """Return the tokens over the cost of all rounds after the first step, in plain steps."""
        cost = n_tokens = 0.0
        plan = self._model.resolve(mode="auto")
        for prompt, answer in pairs:
            self._exit.start([prompt])
            ids, ends = answer.token_ids, self._model.end_tokens
            sources: list[Any] = [self._exit, Ngram(prompt, ends)]
            if with_predictions:
                prediction = self._model.resolve(prediction=partly_right(answer.text)).prediction
                sources.insert(0, Prediction(prediction, ends))
            if text:
                sources.append(DatastoreLookup(_table(text), ends))
            rule = DraftController(sources, self._costs(), greedy=True, eos_token_ids=ends)
            context, done, step = list(prompt), 0, [ids[0]]
            while True:
                context += step
                done += len(step)
                for source in sources:
                    source.update(step)
                if done >= len(ids):
                    break
                draft = _draft([context])
                self._exit.contexts = [context]
                assert plan.draft_tokens is not None
                rule.fill(draft, min(plan.draft_tokens, len(ids) - done - 1))
                drafted = draft.tokens[0].tolist()
                accepted = _agreeing(drafted, ids[done:])
                step = ids[done : done + accepted + 1]
                with replaced(**{name: DEFAULTS[name] for name in OF_COSTS}):
                    default = self._costs().at(len(context))
                used, rule._costs = rule._costs, default
                cost += rule.round_cost(draft)
                rule._costs = used
                rule.update(draft, step, accepted)
            n_tokens += len(ids) - 1
        return round(n_tokens / cost, 3)


def _table(text: tuple[int, ...]) -> datastore.Datastore:
    return _table_of(text, *(getattr(datastore, name) for name in OF_TABLES))


@functools.lru_cache(maxsize=1)
def _table_of(text: tuple[int, ...], *constants: float) -> datastore.Datastore:
    return datastore.Datastore.from_tokens(text)


def _draft(contexts: Sequence[list[int]]) -> Draft:
    """Return an empty draft whose cache has lengths only."""
    cache: Any = SimpleNamespace(lengths=torch.tensor([len(context) - 1 for context in contexts]))
    return Draft(torch.tensor([context[-1:] for context in contexts]), cache, contexts[0])


def _agreeing(drafted: Sequence[int], answer: Sequence[int]) -> int:
    pairs = enumerate(zip(drafted, answer, strict=False))
    return next((i for i, (token, own) in pairs if token != own), len(drafted))


def _gpu_costs(_: Any) -> controller.PassCosts:
    return controller.PassCosts((1.0, 1.0 + controller._GPU_ROW_COST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TRAINED_MODEL)
    parser.add_argument("--tasks", default="topv2,spec_bench")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16")
    prompts = {
        name: [
            model.tokenize(sample.prompt)
            for sample in load_task(name, samples=options.samples, judged=False).samples
        ]
        for name in options.tasks.split(",")
    }
    first, *_ = prompts
    others = load_task(first, samples=options.samples + DATASTORE_ANSWERS, judged=False).samples
    answers = [
        f"{sample.references[0]}\n"
        for sample in others
        if sample.references and model.tokenize(sample.prompt) not in prompts[first]
    ]
    text = tuple(token for answer in answers for token in model.tokenize(answer))
    replay = Replay(model, prompts, options.max_new_tokens, text)
    rows: list[dict[str, Any]] = [{"constant": None, "value": None, "speedup": replay.speedups()}]
    for name, (_, values) in VALUES.items():
        for value in values:
            with replaced(**{name: value}):
                rows.append({"constant": name, "value": value, "speedup": replay.speedups()})
            print(rows[-1], flush=True)
    here = environment_of("benchmarks/draft_constants.py", model)
    deliver({"environment": here, "defaults": DEFAULTS, "rows": rows}, options.output)


if __name__ == "__main__":
    run(main)
