"""The application: endpoints of OpenAI's API, of vLLM's, and the chat page."""

import asyncio
import contextlib
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import layerskip
from layerskip.serve.answers import ChatResponder, CompletionResponder, Responder
from layerskip.serve.errors import add_handlers
from layerskip.serve.guard import Guard
from layerskip.serve.metrics import CONTENT_TYPE
from layerskip.serve.protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Detokenization,
    DetokenizeRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Tokenization,
    TokenizeRequest,
    Version,
)
from layerskip.serve.service import Answers, Service

_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is refused."},
    "5XX": {"model": ErrorResponse, "description": "The server has failed, or is not ready."},
}


def make_app(service: Service) -> ASGIApp:
    """Return the application of a service."""
    app = FastAPI(
        title="layerskip",
        version=layerskip.__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    add_handlers(app)
    _add_answers(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    _add_page(app)
    guarded: ASGIApp = Guard(app, service)
    if not service.config.allow_origin:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=service.config.allow_origin,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type"),
    )


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=_streamed(ChatCompletion, ChatChunk))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        answers = await service.submit(body)
        return await _respond(ChatResponder(service, answers), answers, request)

    @app.post("/v1/completions", responses=_streamed(Completion, Completion))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        answers = await service.submit(body)
        return await _respond(CompletionResponder(service, answers, body), answers, request)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the one model."""
        return ModelList(data=[service.card()])

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        """Describe the model."""
        service.check_model(name)
        return service.card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenization:
        """Return the token ids of a text or conversation."""
        tokens = await service.tokenize(body)
        max_model_len = service.card().max_model_len
        return Tokenization(count=len(tokens), max_model_len=max_model_len, tokens=tokens)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenization:
        """Return the text of token ids."""
        service.check_model(body.model)
        return Detokenization(prompt=await service.detokenize(body.tokens))


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"model": Health, "description": "Not ready."}})
    async def health() -> JSONResponse:
        """Report whether requests are taken."""
        status = 200 if service.state == "ready" else 503
        return JSONResponse(Health(status=service.state).model_dump(), status)

    @app.get("/version")
    async def version() -> Version:
        """Return the version of layerskip."""
        return Version(version=layerskip.__version__)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = files("layerskip.serve") / "page"
    for path, (name, media_type) in _PAGE_FILES.items():
        response = Response((folder / name).read_bytes(), 200, _PAGE_HEADERS, media_type)
        app.add_api_route(path, lambda response=response: response, include_in_schema=False)


def _streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Describe a response that is whole, or streamed with `stream`."""
    return {
        200: {
            "model": whole,
            "description": f"The answer; with stream, events whose data are {chunk.__name__}.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


async def _respond(responder: Responder, answers: Answers, request: Request) -> Response:
    if answers.body.stream:
        return _EventStream(responder, answers)
    try:
        whole = await _unless_disconnected(responder, request)
    finally:
        answers.cancel()
    if whole is None:
        return Response(status_code=499)  # nobody reads it
    return Response(whole.model_dump_json(), media_type="application/json")


async def _unless_disconnected(responder: Responder, request: Request) -> BaseModel | None:
    """Return the whole response; None as soon as the client has gone."""
    whole = asyncio.ensure_future(responder.whole())
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        return await whole if whole.done() else None
    finally:
        for task in (whole, gone):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


async def _disconnect(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events, which end the answers when the client leaves."""

    def __init__(self, responder: Responder, answers: Answers) -> None:
        # For nginx, which would hold events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(responder.stream(), headers=headers, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()
