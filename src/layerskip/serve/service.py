"""`Service`: requests of the API to requests of the engine."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from starlette.concurrency import run_in_threadpool

from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.decoding.prompt import encode
from layerskip.decoding.sampling import nth_seed
from layerskip.serve.config import ServeConfig
from layerskip.serve.engine import (
    Engine,
    EngineStopped,
    Event,
    Failed,
    Finished,
    Handle,
    QueueFull,
    Request,
)
from layerskip.serve.errors import INTERNAL_ERROR, APIError
from layerskip.serve.metrics import AnswerClock, Metrics
from layerskip.serve.protocol import (
    AnswerRequest,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelDetails,
    TokenizeRequest,
)

State = Literal["loading", "ready", "draining"]
_Result = TypeVar("_Result")

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of `POST /v1/completions`
_WARM_UP = "The quick brown fox jumps over the lazy dog."
_WARM_UP_TOKENS = 24


class Answers:
    """The answers to one request, whose events arrive from the engine's thread.

    Attributes:
        body: the request.
        prompts: the token ids of each prompt; answer i belongs to prompt i // n.

    Args:
        metrics: observes the answers.
        log: is told of failures.
    """

    def __init__(
        self,
        body: AnswerRequest,
        prompts: list[list[int]],
        metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:
        self.body, self.prompts = body, prompts
        self._metrics, self._log = metrics, log
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, float, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._clocks: list[AnswerClock] = []
        self._running: set[int] = set()

    def __len__(self) -> int:
        return len(self.prompts) * self.body.n

    def submit(self, engine: Engine, request: Request) -> None:
        """Submit the next answer to the engine; in any thread."""
        index = len(self._handles)

        def on_event(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(
                    self._events.put_nowait, (index, time.perf_counter(), event)
                )

        self._running.add(index)
        self._clocks.append(self._metrics.clock())
        self._handles.append(engine.submit(request, on_event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all answers, each with the number of its answer.

        Raises:
            APIError: an answer has failed, or was ended by the server.
        """
        while self._running:
            index, arrived, event = await self._events.get()
            if isinstance(event, Failed):
                self._metrics.failed()
                self._log(f"a request has failed: {event.message}")
                raise APIError(500, INTERNAL_ERROR)
            if isinstance(event, Finished):
                self._running.discard(index)
                self._clocks[index].finished(arrived, event)
                if event.finish_reason == "cancelled":
                    raise APIError(503, "the server is shutting down; try another one")
            else:
                self._clocks[index].tokens(arrived, len(event.token_ids))
            yield index, event

    def cancel(self) -> None:
        """End all answers that are still running."""
        for index in self._running:
            if index < len(self._handles):
                self._handles[index].cancel()


class Service:
    """One model behind the API.

    Args:
        name: of the model, as clients name it.
        config: of the server.
        defaults: options of decoding that requests may replace.
        log: prints a line for the person who runs the server.

    Attributes:
        state: "loading" until `start`, "draining" from `drain` on.
        default_mode: of requests that name none.
        plain_tokens_per_s: speed of plain decoding, measured at the start.
    """

    def __init__(
        self,
        name: str,
        config: ServeConfig,
        defaults: DecodingConfig,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self.config, self.log = name, config, log
        self.state: State = "loading"
        self.plain_tokens_per_s: float | None = None
        self.metrics = Metrics(name, lambda: self._engine.stats() if self._engine else None)
        self._defaults, self.default_mode = defaults, defaults.mode
        self._model: LayerSkipModel | None = None
        self._engine: Engine | None = None
        self._created = int(time.time())
        # One text at a time: tokenizers are not made for several threads.
        self._tokenizing = asyncio.Lock()

    @property
    def model(self) -> LayerSkipModel:
        """The model; only once it is loaded."""
        assert self._model is not None
        return self._model

    def start(self, model: LayerSkipModel, engine: Engine) -> None:
        """Start the engine, time plain decoding, and take requests."""
        self._model, self._engine = model, engine
        engine.start()
        self.plain_tokens_per_s = _time_plain(model, engine)
        if self.state == "loading":
            self.state = "ready"

    def shutdown(self) -> None:
        """Take no more requests, and return when all answers have ended."""
        self.state = "draining"
        if self._engine is not None:
            self._engine.shutdown(self.config.drain_seconds)

    def check_model(self, name: str | None) -> None:
        """Refuse requests for another model."""
        if name is not None and name != self.name:
            raise APIError(
                404,
                f"there is no model {name[:200]!r} here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def card(self) -> ModelCard:
        """Describe the model."""
        decoder, settings = self.model.decoder, self.model.settings
        return ModelCard(
            id=self.name,
            created=self._created,
            max_model_len=decoder.architecture.max_context,
            layerskip=ModelDetails(
                num_hidden_layers=len(decoder.layers),
                exit_layer=settings.exit_layer,
                weights=decoder.weights,
                kv_cache=decoder.kv_cache,
                dtype=decoder.dtype_name,
                has_chat_template=self.model.has_chat_template,
                plain_tokens_per_s=self.plain_tokens_per_s,
            ),
        )

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Return the token ids of a text or conversation."""
        self.check_model(body.model)
        tokenizer = self.model.tokenizer
        if body.messages is not None:
            prompt = _conversation(body.messages, body.chat_template_kwargs)
            return await self._in_thread(partial(self.model.tokenize, prompt))
        if tokenizer is None:
            raise APIError(400, "this checkpoint has no tokenizer")
        text = body.prompt or ""
        special = body.add_special_tokens
        return await self._in_thread(lambda: encode(text, tokenizer, add_special_tokens=special))

    async def detokenize(self, tokens: list[int]) -> str:
        """Return the text of token ids."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise APIError(400, "this checkpoint has no tokenizer")
        self._check_ids(tokens, "tokens")
        return await self._in_thread(lambda: tokenizer.decode(tokens))

    async def submit(self, body: AnswerRequest) -> Answers:
        """Submit a request to the engine.

        Raises:
            APIError: the request is refused.
        """
        self.check_model(body.model)
        config, prompts = self._decoding(body), self._prompts(body)
        self._check_limits(body, len(prompts))
        if self.config.log_prompts:
            self.log(f"prompts: {prompts}")
        ids = [await self._in_thread(partial(self.model.tokenize, prompt)) for prompt in prompts]
        for tokens in ids:
            self._check_prompt(tokens, "messages" if isinstance(body, ChatRequest) else "prompt")
        answers = Answers(body, ids, self.metrics, self.log)
        try:
            await self._in_thread(lambda: self._submit_all(answers, config))
        except BaseException:
            answers.cancel()
            raise
        return answers

    def _submit_all(self, answers: Answers, config: DecodingConfig) -> None:
        assert self._engine is not None
        body = answers.body
        for i in range(len(answers)):
            request = Request(
                prompt=tuple(answers.prompts[i // body.n]),
                config=DecodingConfig.from_options(config, {"seed": nth_seed(config.seed, i)}),
                num_logprobs=body.num_logprobs,
                continues=isinstance(body, CompletionRequest),
            )
            try:
                answers.submit(self._engine, request)
            except QueueFull:
                raise APIError(429, "too many requests are waiting; try again later") from None
            except EngineStopped:
                raise APIError(503, "the server is shutting down; try another one") from None

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Run work with the tokenizer in another thread; its ValueError is the client's error."""
        async with self._tokenizing:
            try:
                return await run_in_threadpool(work)
            except ValueError as error:
                raise APIError(400, " ".join(str(error).split())) from error

    def _decoding(self, body: AnswerRequest) -> DecodingConfig:
        options = body.options()
        default = self.config.default_max_tokens
        if isinstance(body, CompletionRequest):
            default = DEFAULT_COMPLETION_TOKENS
        options["max_new_tokens"] = min(body.limit or default, self.config.max_tokens)
        defaults = self._defaults if body.layerskip.mode is None else self._defaults.plain()
        try:
            return DecodingConfig.from_options(defaults, options)
        except ValueError as error:
            raise APIError(400, str(error)) from error

    def _prompts(self, body: AnswerRequest) -> list[Any]:
        if isinstance(body, ChatRequest):
            return [_conversation(body.messages, body.chat_template_kwargs)]
        return body.prompts

    def _check_limits(self, body: AnswerRequest, num_prompts: int) -> None:
        limits = {
            "max_tokens": (body.limit or 0, self.config.max_tokens),
            "n": (body.n * num_prompts, self.config.max_n),
            "stop": (len(body.stop_strings), self.config.max_stop),
        }
        for name, (value, limit) in limits.items():
            if value > limit:
                raise APIError(400, f"{name} is {value}, this server allows {limit}", param=name)

    def _check_prompt(self, tokens: list[int], param: str) -> None:
        limit = self.model.decoder.architecture.max_context
        limit = min(limit, self.config.max_prompt_tokens or limit)
        if len(tokens) > limit:
            raise APIError(
                400,
                f"this model's maximum context length is {limit} tokens, the prompt has"
                f" {len(tokens)}; shorten it",
                code="context_length_exceeded",
                param=param,
            )

    def _check_ids(self, tokens: list[int], param: str) -> None:
        size = self.model.decoder.architecture.vocab_size
        if tokens and max(tokens) >= size:
            raise APIError(400, f"token ids have to be below {size}", param=param)


def _conversation(messages: list[Any], variables: Mapping[str, Any] | None) -> dict[str, Any]:
    conversation: dict[str, Any] = {"messages": [message.to_dict() for message in messages]}
    return conversation | ({"chat_template_kwargs": dict(variables)} if variables else {})


def _time_plain(model: LayerSkipModel, engine: Engine) -> float | None:
    """Return the tokens/s of plain decoding, which also warms the model up.

    Raises:
        ValueError: the first answer fails.
    """
    text_ids = [1, 2, 3] if model.tokenizer is None else model.tokenize(_WARM_UP)
    config = DecodingConfig(mode="plain", max_new_tokens=_WARM_UP_TOKENS, ignore_eos=True)
    events: list[Event] = []
    ended = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, Finished | Failed):
            ended.set()

    engine.submit(Request(prompt=tuple(text_ids), config=config), on_event)
    ended.wait()
    last = events[-1]
    if isinstance(last, Failed):  # every answer would fail, as with weights that are NaN
        raise ValueError(last.message.removeprefix("ValueError: "))
    if not isinstance(last, Finished) or last.completion_tokens < 2 or not last.decode_s:
        return None
    return (last.completion_tokens - 1) / last.decode_s
