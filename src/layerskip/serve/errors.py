"""Errors as OpenAI's API reports them; no traceback, path or internal name reaches a client."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from layerskip.serve.protocol import ErrorObject, ErrorResponse

RETRY_AFTER_S = 1
INTERNAL_ERROR = "the server failed to answer this request"
_CODES = {429: "rate_limit_exceeded", 503: "service_unavailable"}
_TYPE_NAMES = frozenset(("str", "int", "float", "bool", "none", "nullable"))  # branches of a union


class APIError(Exception):
    """A request that is refused or has failed.

    Args:
        status: of HTTP.
        message: one line for the client.
        code: OpenAI's code, for clients that act on it.
        param: the field of the request that is to blame.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorResponse(
            error=ErrorObject(
                message=message,
                type="server_error" if status >= 500 else "invalid_request_error",
                param=param,
                code=code or _CODES.get(status),
            )
        )

    def response(self) -> JSONResponse:
        """Return the answer of HTTP."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # or the rest of the body would be read
            headers["Connection"] = "close"
        return JSONResponse(self.body.model_dump(), self.status, headers)


def add_handlers(app: FastAPI) -> None:
    """Make every error of an app an error object."""

    @app.exception_handler(APIError)
    def refused(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    def http_error(_: Request, error: HTTPException) -> JSONResponse:
        message = "there is nothing at this address" if error.status_code == 404 else error.detail
        response = APIError(error.status_code, str(message)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return APIError(500, INTERNAL_ERROR).response()


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Describe one of pydantic's errors, without the value that it quotes.

    Of a union there is one for each branch; the deepest is that of the branch that was meant.
    """
    first = max(errors, key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        return APIError(400, "the body is not valid JSON")
    param, message = _path(first["loc"]), str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return APIError(
            400, f"'{param}' is not supported by this server; leave it out", param=param
        )
    if first["type"] == "value_error":
        return APIError(400, message, param=param or None)
    if not param:
        return APIError(400, "the body has to be a JSON object, sent as application/json")
    return APIError(400, f"{param}: {message}", param=param)


def _path(loc: Sequence[str | int]) -> str:
    """Return the place of a field, such as messages[0].content."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
    return path
