"""Peers set up for one comparison: the same checkpoint, tokenizer, precision, and rules."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerskip.bench.measure import Run, Setting, SystemFailedError
from layerskip.decoding import LayerSkipModel, Step
from layerskip.model import native, resolve

# What the libraries' documentation says of prompt lookup: transformers shows it with 10 tokens, and of
# llama-cpp-python 10 are for GPUs, and 2 better on a CPU alone.
PROMPT_LOOKUP_TOKENS = 10
PROMPT_LOOKUP_TOKENS_ON_A_CPU = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The terms of a comparison, as plain values that JSON can carry.

    Attributes:
        model: the checkpoint folder or GGUF file, as `resolve` gives it.
        gguf: a GGUF file of the same weights, for llama.cpp; None where it is not asked for.
        tokenizer: a folder with the checkpoint's tokenizer; None where it has none.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...
        threads: CPU threads.
        context: tokens that the longest prompt and its answer take.
        end_tokens: tokens that end an answer; empty to go on after them.
        stop: texts that end an answer.
        settings: the rows that this peer is asked for.
    """

    model: str
    gguf: str | None = None
    tokenizer: str | None = None
    dtype: str
    device: str = "cpu"
    threads: int
    context: int
    end_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    settings: Sequence[Setting] = ()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        """Undo `dataclasses.asdict`."""
        return cls(**{**fields, "settings": [Setting(**each) for each in fields["settings"]]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerKind:
    """Where a peer is: the module with its `settings(drafts)` and `Peer(job)`, and what it needs."""

    module: str
    package: str
    distribution: str


# The first one that is installed is llama.cpp's.
_LLAMA_CPP = (
    PeerKind(
        module="layerskip.bench.baselines.llama_server",
        package="xllamacpp",
        distribution="xllamacpp",
    ),
    PeerKind(
        module="layerskip.bench.baselines.llama_cpp",
        package="llama_cpp",
        distribution="llama-cpp-python",
    ),
)

BASELINES = {
    "transformers": PeerKind(
        module="layerskip.bench.baselines.transformers",
        package="transformers",
        distribution="transformers",
    ),
    "llama.cpp": next(
        (kind for kind in _LLAMA_CPP if importlib.util.find_spec(kind.package)), _LLAMA_CPP[0]
    ),
}


# `python -m layerskip.bench.baselines`, but no module of the working folder takes a package's place.
_START = f"""
import sys
sys.path = [path for path in sys.path if path]
import runpy
runpy.run_module("{__package__}", run_name="__main__", alter_sys=True)
"""


class BaselineProcess:
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

    def __enter__(self) -> "BaselineProcess":
        if self._failure is not None:
            return self
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, BASELINES[self.name].module],
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


@contextlib.contextmanager
def start_baselines(
    model: LayerSkipModel,
    names: Sequence[str],
    *,
    source: str,
    drafts: Sequence[tuple[int, int]],
    context: int,
    stop: Sequence[str],
    ignore_eos: bool,
    gguf_weights: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[BaselineProcess]]:
    """Start a process for each peer; all of them end with the context.

    A peer that cannot take part (not installed, a file that it cannot read) is in the list as well, and
    says so when it is asked for an answer.

    Args:
        model: this package's own, whose precision, device and end tokens hold for all.
        names: of `BASELINES`.
        source: the checkpoint's name.
        drafts: pairs (E, d) of self-speculative decoding to compare with.
        context: tokens of the longest prompt and its answer.
        stop: texts that end an answer.
        ignore_eos: answers go on after an end token.
        gguf_weights: how llama.cpp's file keeps weights, see `export.GGUF_WEIGHTS`.
        progress: told how many have started, and of how many.
    """
    with contextlib.ExitStack() as stack:
        peers = []
        if names:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="layerskip-peers-"))
            job = Job(
                model=str(resolve(source)),
                tokenizer=None if model.tokenizer is None else folder,
                gguf=str(Path(folder) / "model.gguf"),
                dtype=model.decoder.dtype_name,
                device=str(model.decoder.device),
                threads=native.num_threads_to_use(),  # as many as the kernels take here
                context=context,
                end_tokens=() if ignore_eos else sorted(model.end_tokens),
                stop=tuple(stop),
            )
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
        for number, name in enumerate(names):
            progress(number, len(names))
            failure = _prepare(name, job, gguf_weights)
            settings = importlib.import_module(BASELINES[name].module).settings(drafts)
            peer = BaselineProcess(name, dataclasses.replace(job, settings=settings), failure)
            peers.append(stack.enter_context(peer))
            progress(number + 1, len(names))
        yield peers


def _prepare(name: str, job: Job, gguf_weights: str) -> str | None:
    """Make what a peer needs on top of the checkpoint; returns why it cannot take part, or None."""
    kind = BASELINES[name]
    if importlib.util.find_spec(kind.package) is None:
        return f"{kind.distribution} is not installed; run: pip install 'layerskip[baselines]'"
    if name == "llama.cpp":
        from layerskip.export import open_source, to_gguf

        assert job.gguf is not None
        try:
            to_gguf(open_source(job.model), Path(job.gguf), weights=gguf_weights)
        except ValueError as error:
            return f"no GGUF file can be made of this checkpoint: {error}"
    return None
