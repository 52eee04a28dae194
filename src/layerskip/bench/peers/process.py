"""A peer's process, from the outside: asked for one answer at a time, so that it takes its turn."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from layerskip.bench.measure import Run, Setting, SystemFailedError
from layerskip.bench.peers.job import Job
from layerskip.decoding import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerKind:
    """Where a peer is: the module with its `settings(drafts)` and `Peer(job)`, and what it needs."""

    module: str
    package: str
    distribution: str


# The first one that is installed is llama.cpp's.
_LLAMA_CPP = (
    PeerKind(
        module="layerskip.bench.peers.llama_server",
        package="xllamacpp",
        distribution="xllamacpp",
    ),
    PeerKind(
        module="layerskip.bench.peers.llama_cpp",
        package="llama_cpp",
        distribution="llama-cpp-python",
    ),
)

PEERS = {
    "transformers": PeerKind(
        module="layerskip.bench.peers.transformers",
        package="transformers",
        distribution="transformers",
    ),
    "llama.cpp": next(
        (kind for kind in _LLAMA_CPP if importlib.util.find_spec(kind.package)), _LLAMA_CPP[0]
    ),
}


# `python -m layerskip.bench.peers`, but no module of the working folder takes a package's place.
_START = f"""
import sys
sys.path = [path for path in sys.path if path]
import runpy
runpy.run_module("{__package__}", run_name="__main__", alter_sys=True)
"""


class PeerProcess:
    """A system that runs elsewhere. Enter it to start it; a peer that cannot start fails when asked.

    One line of JSON goes in for each answer and one comes out; see `__main__.py`.

    Attributes:
        build: the library's build flags, once it has started; None where it does not name them.
    """

    def __init__(self, name: str, job: Job, failure: str | None = None) -> None:
        """Describe a peer; with a reason why it cannot take part, no process will be started."""
        self.name, self.settings = name, job.settings
        self.build: str | None = None
        self._job, self._failure = job, failure
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "PeerProcess":
        if self._failure is not None:
            return self
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, PEERS[self.name].module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # of what it starts, from Python 3.11 on
        )
        try:
            self.build = self._ask(dataclasses.asdict(self._job))["build"]
        except SystemFailedError as error:
            self._failure = str(error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._log.close()

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        if self._failure is not None:
            raise SystemFailedError(self._failure)
        reply = self._ask(
            {
                "setting": list(self.settings).index(setting),
                "prompt": list(prompt),
                "max_new_tokens": max_new_tokens,
            }
        )
        steps = tuple(Step(tuple(step["tokens"])) for step in reply.pop("steps"))
        return Run(steps=steps, **reply)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # a broken pipe, which Windows calls an invalid argument
            line = ""
        if not line:
            self._failure = f"its process ended with status {process.wait()}{self._last_words()}"
            raise SystemFailedError(self._failure)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SystemFailedError(reply["error"])
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f": {lines[-1]}" if lines else ""
