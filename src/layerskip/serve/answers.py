"""Events of the engine to the responses of the API, whole or streamed."""

import abc
import dataclasses
import itertools
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

import layerskip
from layerskip.decoding.sampling import TokenLogprobs
from layerskip.decoding.streaming import TextStream
from layerskip.serve.engine import Finished, Tokens
from layerskip.serve.errors import APIError
from layerskip.serve.protocol import (
    ChatAnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChunkSources,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionTokensDetails,
    Delta,
    DraftReport,
    PromptTokensDetails,
    SourceText,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from layerskip.serve.service import Answers, Service
from layerskip.serve.token_text import token_bytes, token_text

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of an answer that one event adds."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    sources: tuple[SourceText, ...] = ()


class Choice:
    """One answer as far as it has come."""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int], before: Sequence[int]) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.sources: list[SourceText] = []
        self.finished: Finished | None = None
        self._end_tokens = end_tokens
        self._runs = None if tokenizer is None else SourceRuns(tokenizer, before)

    def add(self, event: Tokens, *, with_sources: bool) -> Piece:
        """Add a round's tokens and return what they add."""
        # An end token has no text, and so no place among the log probabilities of the text.
        logprobs = [p for p in event.logprobs or () if p.token_id not in self._end_tokens]
        sources: list[SourceText] = []
        if with_sources and self._runs is not None:
            sources = self._runs.add(event)
        self.text += event.text
        self.logprobs += logprobs
        self.sources += sources
        return Piece(event.text, tuple(logprobs), tuple(sources))


class SourceRuns:
    """Splits released text by the drafters of its tokens.

    The engine releases text later than its tokens, and less where a stop string ends it: characters are
    counted off in the order of the tokens.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._stream = TextStream(tokenizer, (), before)
        self._waiting: deque[SourceText] = deque()

    def add(self, event: Tokens) -> list[SourceText]:
        """Return the runs of an event's text; neighbours have different sources."""
        for token, source in zip(event.token_ids, event.sources, strict=True):
            text = self._stream.push(token)
            self._waiting.append(SourceText(text=text, source=source, tokens=1))
        runs: list[SourceText] = []
        rest = event.text
        while rest:
            run = SourceText(text=rest, source="model", tokens=0)
            run = self._waiting.popleft() if self._waiting else run
            n = len(run.text)
            if n > len(rest):  # the rest of the run is held back
                late = SourceText(text=run.text[len(rest) :], source=run.source, tokens=0)
                self._waiting.appendleft(late)
            _append(runs, SourceText(text=rest[:n], source=run.source, tokens=run.tokens))
            rest = rest[n:]
        return runs


def _append(runs: list[SourceText], run: SourceText) -> None:
    if runs and not (runs[-1].text and run.text):  # the rest of a character, or nothing yet
        run.source = run.source if run.text else runs[-1].source
        runs[-1].source = run.source
    if runs and runs[-1].source == run.source:
        runs[-1].text += run.text
        runs[-1].tokens += run.tokens
    else:
        runs.append(run)


class Responder(abc.ABC):
    """Makes the response to one request, whole or in chunks.

    Args:
        service: that answers.
        answers: of the request.
    """

    id_prefix = ""

    def __init__(self, service: Service, answers: Answers) -> None:
        body = answers.body
        self._service, self._answers, self._layerskip = service, answers, body.layerskip
        self._tokenizer = service.model.tokenizer
        self._with_logprobs = body.num_logprobs is not None
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._envelope: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": f"layerskip-{layerskip.__version__}",
        }
        ends = frozenset[int]() if body.ignore_eos else service.model.end_tokens
        self._choices = [
            Choice(self._tokenizer, ends, self._before(i)) for i in range(len(answers))
        ]

    async def whole(self) -> BaseModel:
        """Return the response of a request without `stream`."""
        async for index, event in self._answers.events():
            if isinstance(event, Tokens):
                self._choices[index].add(event, with_sources=self._layerskip.sources)
            elif isinstance(event, Finished):
                self._choices[index].finished = event
        return self._response(self._usage(), self._report(with_sources=self._layerskip.sources))

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events; an error is one of them, too."""
        try:
            async for chunk in self._chunks():
                yield _event(chunk.model_dump_json(exclude_unset=True))
        except APIError as error:
            yield _event(error.body.model_dump_json())
        yield _event("[DONE]")

    async def _chunks(self) -> AsyncIterator[BaseModel]:
        # With include_usage every chunk has the field, and a last one without choices its value.
        extra: dict[str, Any] = {"usage": None} if self._include_usage else {}
        for index in range(len(self._choices)):
            if opening := self._opening(index):
                yield self._chunk([opening], **extra)
        async for index, event in self._answers.events():
            choice = self._choices[index]
            if isinstance(event, Tokens):
                offset = len(choice.text)
                piece = choice.add(event, with_sources=self._layerskip.sources)
                if not (piece.text or piece.logprobs):
                    continue
                sources = {}
                if piece.sources:
                    sources = {"layerskip": ChunkSources(sources=list(piece.sources))}
                yield self._chunk([self._addition(index, piece, offset)], **extra, **sources)
            elif isinstance(event, Finished):
                choice.finished = event
                report = {}
                if all(one.finished for one in self._choices):
                    report = {"layerskip": self._report()}
                yield self._chunk([self._ending(index, event.finish_reason)], **extra, **report)
        if self._include_usage:
            yield self._chunk([], usage=self._usage())

    def _before(self, index: int) -> Sequence[int]:
        """Return the tokens that an answer's text continues."""
        return ()

    @abc.abstractmethod
    def _response(self, usage: Usage, report: DraftReport) -> BaseModel:
        """Return the whole response."""

    @abc.abstractmethod
    def _chunk(self, choices: list[Any], **fields: Any) -> BaseModel:
        """Return a chunk of the response."""

    @abc.abstractmethod
    def _opening(self, index: int) -> BaseModel | None:
        """Return the choice of a chunk before an answer's first token."""

    @abc.abstractmethod
    def _addition(self, index: int, piece: Piece, offset: int) -> BaseModel:
        """Return the choice of a chunk that adds text at an offset."""

    @abc.abstractmethod
    def _ending(self, index: int, finish_reason: Any) -> BaseModel:
        """Return the choice of a chunk that ends an answer."""

    def _usage(self) -> Usage:
        finished = [_finished(choice) for choice in self._choices]
        prompt_tokens = sum(map(len, self._answers.prompts))
        completion_tokens = sum(one.completion_tokens for one in finished)
        # The first answer to each prompt; the others reuse its prompt.
        first = finished[:: self._answers.body.n]
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(one.cached_tokens for one in first)
            ),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=sum(one.accepted_prediction_tokens for one in finished),
                rejected_prediction_tokens=sum(one.rejected_prediction_tokens for one in finished),
            ),
        )

    def _report(self, *, with_sources: bool = False) -> DraftReport:
        """Describe the drafting of all answers together."""
        finished = [_finished(choice) for choice in self._choices]
        drafted = sum(one.drafted for one in finished)
        accepted = sum(one.accepted for one in finished)
        rounds = sum(one.rounds for one in finished)
        # The first token of each answer comes from the prompt's own pass.
        decoded = sum(max(one.completion_tokens - 1, 0) for one in finished)
        decode_s = max(one.decode_s for one in finished)
        by_source: dict[str, tuple[int, int]] = {}
        for one in finished:
            for source, (d, a) in one.by_source.items():
                before = by_source.get(source, (0, 0))
                by_source[source] = before[0] + d, before[1] + a
        report = DraftReport(
            mode=self._layerskip.mode or self._service.default_mode,
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            acceptance_rate=accepted / drafted if drafted else None,
            mean_accepted_length=decoded / rounds if rounds else None,
            by_source=by_source,
            ttft_s=max(one.ttft_s for one in finished),
            tokens_per_s=decoded / decode_s if decode_s and decoded else None,
            plain_tokens_per_s=self._service.plain_tokens_per_s,
        )
        if with_sources:
            report.sources = [choice.sources for choice in self._choices]
        return report


class ChatResponder(Responder):
    """Responses of `POST /v1/chat/completions`."""

    id_prefix = "chatcmpl"

    def _response(self, usage: Usage, report: DraftReport) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswerMessage(content=choice.text),
                logprobs=self._logprobs(choice.logprobs),
                finish_reason=_finish_reason(choice),
            )
            for index, choice in enumerate(self._choices)
        ]
        return ChatCompletion(**self._envelope, choices=choices, usage=usage, layerskip=report)

    def _chunk(self, choices: list[Any], **fields: Any) -> BaseModel:
        return ChatChunk(
            **self._envelope, object="chat.completion.chunk", choices=choices, **fields
        )

    def _opening(self, index: int) -> BaseModel | None:
        delta = Delta(role="assistant", content="")
        return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)

    def _addition(self, index: int, piece: Piece, offset: int) -> BaseModel:
        return ChatChunkChoice(
            index=index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=None,
        )

    def _ending(self, index: int, finish_reason: Any) -> BaseModel:
        return ChatChunkChoice(
            index=index, delta=Delta(), logprobs=None, finish_reason=finish_reason
        )

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        content = [
            TokenLogprob(
                **self._logprob(one.token_id, one.logprob).model_dump(),
                top_logprobs=[self._logprob(*pair) for pair in one.top],
            )
            for one in positions
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _logprob(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=token_text(self._tokenizer, token_id),
            logprob=max(logprob, LOWEST_LOGPROB),
            bytes=list(token_bytes(self._tokenizer, token_id)),
        )


class CompletionResponder(Responder):
    """Responses of `POST /v1/completions`."""

    id_prefix = "cmpl"

    def __init__(self, service: Service, answers: Answers, body: CompletionRequest) -> None:
        self._body = body
        super().__init__(service, answers)

    def _before(self, index: int) -> Sequence[int]:
        return self._answers.prompts[index // self._body.n]

    def _response(self, usage: Usage, report: DraftReport) -> BaseModel:
        choices = [
            CompletionChoice(
                index=index,
                text=self._echo(index) + choice.text,
                logprobs=self._logprobs(choice.logprobs, 0),
                finish_reason=_finish_reason(choice),
            )
            for index, choice in enumerate(self._choices)
        ]
        return Completion(**self._envelope, choices=choices, usage=usage, layerskip=report)

    def _chunk(self, choices: list[Any], **fields: Any) -> BaseModel:
        return Completion(**self._envelope, object="text_completion", choices=choices, **fields)

    def _opening(self, index: int) -> BaseModel | None:
        if not self._body.echo:
            return None
        return CompletionChoice(
            index=index, text=self._echo(index), logprobs=None, finish_reason=None
        )

    def _addition(self, index: int, piece: Piece, offset: int) -> BaseModel:
        return CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=self._logprobs(piece.logprobs, offset),
            finish_reason=None,
        )

    def _ending(self, index: int, finish_reason: Any) -> BaseModel:
        return CompletionChoice(index=index, text="", logprobs=None, finish_reason=finish_reason)

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index // self._body.n]
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else str(self._tokenizer.decode(prompt))

    def _logprobs(
        self, positions: Sequence[TokenLogprobs], offset: int
    ) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        tokens = [token_text(self._tokenizer, one.token_id) for one in positions]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[max(one.logprob, LOWEST_LOGPROB) for one in positions],
            top_logprobs=[
                {
                    token_text(self._tokenizer, token): max(logprob, LOWEST_LOGPROB)
                    for token, logprob in one.top
                }
                for one in positions
            ],
            text_offset=list(itertools.accumulate(map(len, tokens[:-1]), initial=offset)),
        )


def _finish_reason(choice: Choice) -> Any:
    return _finished(choice).finish_reason


def _finished(choice: Choice) -> Finished:
    assert choice.finished is not None
    return choice.finished


def _event(data: str) -> str:
    return f"data: {data}\n\n"
