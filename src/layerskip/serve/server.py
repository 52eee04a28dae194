"""The process: a socket, loading beside it, signals, and draining."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerskip.decoding import LayerSkipModel
from layerskip.serve.app import make_app
from layerskip.serve.config import ServeConfig
from layerskip.serve.engine import Engine
from layerskip.serve.service import Service

_LAST_BYTES_S = 5  # for clients that read slowly, after the last answer has ended


def listen(config: ServeConfig) -> socket.socket:
    """Bind the server's address.

    Raises:
        OSError: it is taken or does not exist; one line says what to do.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if os.name != "nt":  # where it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    except OSError as error:
        raise OSError(
            f"{config.host} port {config.port} cannot be listened on: {error.strerror or error};"
            " choose another --port or --host"
        ) from error
    return listener


def make_engine(model: LayerSkipModel, config: ServeConfig) -> Engine:
    """Return the engine of a server."""
    return Engine(
        model,
        kv_cache_tokens=config.kv_cache_tokens,
        max_num_seqs=config.max_num_seqs,
        max_queue=config.max_queue,
        prefill_chunk=config.prefill_chunk,
    )


class Server(uvicorn.Server):
    """Serves from the first moment on, loads the model beside it, and drains at the end.

    Args:
        service: that answers.
        load: returns the model and its engine; called in a thread of its own.
        ready: called when requests are taken.
    """

    def __init__(
        self,
        service: Service,
        load: Callable[[], tuple[LayerSkipModel, Engine]],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=_with_header_timeout(config.header_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._service, self._load, self._ready = service, load, ready
        self._signals = 0
        self._draining: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal has come and all answers have ended.

        Raises:
            Exception: the model could not be loaded.
        """
        threading.Thread(target=self._start, name="layerskip-load", daemon=True).start()
        self.run(sockets=[listener])
        if self._failure is not None:
            raise self._failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)

    def drain(self) -> None:
        """Drain as after a signal; thread-safe."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Return True where the server shall end; called ten times a second."""
        await super().on_tick(counter)
        if self._signals and self._draining is None:
            if self._service.state == "loading":
                return True
            self._draining = _in_thread(self._service.shutdown)
        drained = self._draining is not None and self._draining.done()
        return drained or self._failure is not None

    def _start(self) -> None:
        try:
            self._service.start(*self._load())
        except BaseException as error:
            self._failure = error
        else:
            self._ready()


def _in_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run work in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def run() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(future.set_result, None)

    threading.Thread(target=run, daemon=True).start()
    return future


def _with_header_timeout(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, which closes connections whose headers do not arrive in time."""

    class Protocol(H11Protocol):
        """HTTP/1.1 with a limit on the time of headers."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._close)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._stop_timer()
            elif self._timer is None and (before is None or before.response_complete):
                self._timer = self.loop.call_later(seconds, self._close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            self.transport.close()

    return Protocol
