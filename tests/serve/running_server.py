"""A server over the tiny checkpoint, in a thread of the test process."""

import threading

import httpx
from held_engine import HeldEngine

from layerskip import LayerSkipModel
from layerskip.decoding import DecodingConfig
from layerskip.serve.config import ServeConfig
from layerskip.serve.server import Server, listen
from layerskip.serve.service import Service

CHAT = "/v1/chat/completions"
PATIENCE_S = 60  # for a server that hangs; nothing is measured


class RunningServer:
    """A server that listens on a free port.

    Attributes:
        url: without a slash at the end.
        model: a model of the same weights, for comparison.
        engine: of the server.
        log: lines that it has printed.
    """

    def __init__(self, folder, load=None, **options):
        config = ServeConfig(**{"port": 0, "drain_seconds": 10, **options})
        self.log, self._ready = [], threading.Event()
        self.service = Service("tiny", config, DecodingConfig(temperature=1.0), self.log.append)
        self.model = LayerSkipModel.from_pretrained(folder, dtype="float32")
        self.engine = None

        def make():
            model = LayerSkipModel.from_pretrained(folder, dtype="float32")
            self.engine = HeldEngine(model, max_queue=config.max_queue)
            return model, self.engine

        listener = listen(config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = Server(self.service, load or make, self._ready.set)
        self._thread = threading.Thread(target=self._run, args=(listener,))
        self.failure = None
        self._thread.start()
        if load is None:
            assert self._ready.wait(PATIENCE_S)

    def client(self, **headers):
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, headers=headers)

    def chat(self, text="Hello", **fields):
        """The JSON body of a short greedy request."""
        messages = [{"role": "user", "content": text}]
        return {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}

    def join(self):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def close(self):
        self.engine and self.engine.resumed.set()
        self.server.drain()
        self.join()

    def _run(self, listener):
        try:
            self.server.run_on(listener)
        except BaseException as error:
            self.failure = error


def error_of(response, status):
    """The error object of a response, which has a status."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
