"""lm-evaluation-harness over every way of decoding, through its public interface `LM`."""

import functools
import hashlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from layerskip.bench.bench import Row
from layerskip.bench.perplexity import prefix_token, windows
from layerskip.bench.quality import Passage, Progress, Score, score_passages
from layerskip.decoding import LayerSkipModel, Plan
from layerskip.decoding.sampling import nth_seed

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        f"tasks of lm-evaluation-harness need it: pip install 'layerskip[eval]' ({error})"
    ) from error

DEFAULT_NEW_TOKENS = 256  # the harness's own default where a task says nothing
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class SharedScores:
    """Scores of passages at all exits, computed once: every exit's LM asks for the same ones."""

    def __init__(self, model: LayerSkipModel, exits: Collection[int], batch_size: int) -> None:
        self._model, self._exits, self._batch_size = model, exits, batch_size
        self._known: dict[tuple[bytes, int], dict[int, Score]] = {}

    def at(self, exit_layer: int, passages: Sequence[Passage], progress: Progress) -> list[Score]:
        """Scores of one exit, in the order of the passages."""
        keys = [_key(passage) for passage in passages]
        unknown = {k: p for k, p in zip(keys, passages, strict=True) if k not in self._known}
        what = f"likelihoods at {len(self._exits)} exits"
        found = score_passages(
            self._model.decoder,
            list(unknown.values()),
            self._exits,
            batch_size=self._batch_size,
            progress=lambda done, total: progress(what, done, total),
        )
        self._known.update(zip(unknown, found, strict=True))
        return [self._known[key][exit_layer] for key in keys]


def _key(passage: Passage) -> tuple[bytes, int]:
    """A short name of a passage: tasks hold millions of tokens, which are not to be kept twice."""
    tokens = array("q", passage.tokens).tobytes()
    return hashlib.blake2b(tokens, digest_size=16).digest(), passage.scored


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model in one way of decoding, as the harness sees it.

    Likelihoods are those of the exit that has the last word; answers are decoded as the plan says.

    Attributes:
        row: counts drafted and accepted tokens over the answers given so far.
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
        self._exit = row.plan.final_exit(len(model.decoder.layers))

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        token = prefix_token(self.tokenizer)
        if token is None:
            raise ValueError(
                "a text without context needs a begin or end token, and this tokenizer names none"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; a text that begins with the prefix token already gets no second one."""
        if add_special_tokens is None:
            token = prefix_token(self.tokenizer)
            prefix = None if token is None else self.tokenizer.decode([token])
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the model's own text; those of the system are left out where it has no place."""
        from jinja2 import TemplateError

        render = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            text: str = render(chat_history)
        except TemplateError:  # as the harness itself does
            text = render([message for message in chat_history if message["role"] != "system"])
        return text

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would say it) of continuations after contexts."""
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
        """Log-likelihoods of whole texts, each in windows of max_length tokens."""
        length = self._max_length
        streams = ([self.prefix_token_id, *self.tok_encode(r.args[0])] for r in requests)
        texts = [list(windows(stream, length, length)) for stream in streams]
        flat = [passage for passages in texts for passage in passages]
        scores = iter(self._scores.at(self._exit, flat, self._progress))
        return [sum(next(scores).log_likelihood for _ in passages) for passages in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers, decoded one after the other in the row's mode."""
        texts = []
        for i, request in enumerate(requests):
            context, wishes = request.args
            options = generation_options(wishes)
            room = self._max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"a task asks for {options['max_new_tokens']} new tokens, which leaves no room"
                    f" for a prompt in a context of {self._max_length}"
                )
            generation = self._model.generate(
                self.tok_encode(context)[-room:],
                **options,
                **self.row.plan.options,
                seed=nth_seed(self._seed, i),
            )
            self.row.drafted += generation.drafted
            self.row.accepted += generation.accepted
            texts.append(generation.text)
            self._progress(f"answers, {describe(self.row.plan)}", i + 1, len(requests))
        return texts


def _passage(tokens: Sequence[int], scored: int) -> Passage:
    return Passage(tuple(tokens), min(scored, len(tokens) - 1))


def describe(plan: Plan) -> str:
    """A plan in words: "early-exit, E=8"."""
    parts = {"E": plan.exit_layer, "d": plan.draft_tokens}
    return ", ".join([plan.mode, *(f"{k}={v}" for k, v in parts.items() if v is not None)])


def generation_options(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """What a task asks of generation, as arguments of `LayerSkipModel.answer`.

    Raises:
        ValueError: it asks for something that is not there, such as beams.
    """
    left = dict(wishes)
    lengths = [n for name in _LENGTH_NAMES if (n := left.pop(name, None)) is not None]
    until = left.pop("until", None) or []
    sampled, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    options: dict[str, Any] = {
        "max_new_tokens": int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": 0.0 if sampled is False else float(temperature),
        "repetition_penalty": float(left.pop("repetition_penalty", 1.0)),
    }
    for name in ("top_k", "top_p", "min_p"):
        value = left.pop(name, None)
        options[name] = value if value and options["temperature"] > 0 else None
    unknown = {
        k: v for k, v in left.items() if (k, v) not in (("num_beams", 1), ("use_cache", True))
    }
    if unknown:
        raise ValueError(
            f"a task asks for generation with {', '.join(f'{k}={v}' for k, v in unknown.items())},"
            " which layerskip does not have"
        )
    return options
