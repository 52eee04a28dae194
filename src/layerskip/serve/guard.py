"""`Guard`: refuses requests before the application reads them, and bounds their bodies."""

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerskip.serve.errors import APIError
from layerskip.serve.service import Service

# The page has no secrets, asks for the key itself, and a balancer has none.
OPEN_PATHS = frozenset(("/", "/page.js", "/page.css", "/health"))
_LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "[::1]"))
_DISCARDED_BODIES = 8  # times the limit: a client that is still sending does not read the answer


class Guard:
    """Checks host, key, readiness and body of every request.

    Args:
        app: the application.
        service: that it uses.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._config = app, service, service.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            body = await self._body(Headers(scope=scope), receive)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        config, key = self._config, self._config.api_key
        # A page of another site can reach this address under a name of its own that it has made to
        # mean 127.0.0.1.
        if config.auth and key is None and _host_name(headers) not in {*_LOCAL_NAMES, config.host}:
            raise APIError(403, "without an API key this server answers to localhost alone")
        if key is not None and path not in OPEN_PATHS:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(token.strip().encode(), key.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise APIError(
                    401,
                    "the API key is missing or wrong; send it as a bearer token",
                    code="invalid_api_key",
                )
        needs_model = method == "POST" or path.startswith("/v1/")
        if needs_model and self._service.state != "ready":
            raise APIError(503, f"the server is {self._service.state}; try again later")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body; None where the client has gone."""
        reading = _read(receive, self._config.max_body_bytes)
        try:
            return await asyncio.wait_for(reading, self._config.body_timeout)
        except asyncio.TimeoutError:
            raise APIError(408, "the body did not arrive in time") from None


def _host_name(headers: Headers) -> str:
    host = headers.get("host", "").lower()
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


async def _read(receive: Receive, limit: int) -> bytes | None:
    """Return a body; None where the client has gone."""
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            body += chunk
        if not message.get("more_body") or size > _DISCARDED_BODIES * limit:
            break
    if size > limit:
        raise APIError(413, f"the body is larger than {limit} bytes, the limit of this server")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which has been read, and then goes on."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
