"""Processes of baselines: what one is given, how it is started and asked, and its loop.

Requests and replies are lines of JSON: a `Job` first, then one request and one reply for each answer.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from layerskip.bench.measure import Run, Setting, SystemFailedError
from layerskip.decoding import DecodingConfig, LayerSkipModel, Step
from layerskip.model import native, resolve

# The documentation of transformers shows prompt lookup with 10 tokens; llama.cpp's own examples for a
# CPU take 2.
PROMPT_LOOKUP_TOKENS = 10
PROMPT_LOOKUP_TOKENS_ON_A_CPU = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The terms of a comparison, as plain values that JSON can carry.

    Attributes:
        model: the checkpoint folder or GGUF file.
        gguf: path of a GGUF file of the same weights, for llama.cpp.
        tokenizer: a folder with the checkpoint's tokenizer; None where it has none.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...
        threads: number of CPU threads.
        context: number of tokens that the longest prompt and its answer take.
        eos_token_ids: tokens that end an answer; empty to ignore them.
        stop: texts that end an answer.
        settings: rows of this baseline.
    """

    model: str
    gguf: str = ""
    tokenizer: str | None = None
    dtype: str
    device: str = "cpu"
    threads: int
    context: int
    eos_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    settings: Sequence[Setting] = ()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        """Undo `dataclasses.asdict`."""
        settings = [
            Setting(**{**each, "config": DecodingConfig(**each["config"])})
            for each in fields["settings"]
        ]
        return cls(**{**fields, "settings": settings})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineSpec:
    """A baseline.

    Attributes:
        module: has `settings(drafts)` and `Engine(job)`.
        package: that it imports.
        distribution: that has the package.
        process_per_setting: each setting has a process of its own, else all share one.
    """

    module: str
    package: str
    distribution: str
    process_per_setting: bool = False


BASELINES = {
    "transformers": BaselineSpec(
        module="layerskip.bench.baselines.transformers",
        package="transformers",
        distribution="transformers",
    ),
    "llama.cpp": BaselineSpec(
        module="layerskip.bench.baselines.llama_cpp",
        package="xllamacpp",
        distribution="xllamacpp",
        # The threads of several servers in one process are more than the cores; OpenMP then puts them to
        # sleep at each barrier, which makes each server a third slower.
        process_per_setting=True,
    ),
}


def prompt_lookup(draft_tokens: int) -> Setting:
    """Return the setting of drafts by n-gram lookup."""
    config = DecodingConfig(mode="self-speculative", draft_from="n-gram", draft_tokens=draft_tokens)
    return Setting(config=config, mode="prompt-lookup")


# Without the working folder on the path, whose modules could take a package's place.
_START = f"""
import sys
sys.path = [path for path in sys.path if path]
from {__name__} import main
main(sys.argv[1])
"""


def main(module: str) -> None:
    """Run a baseline's process."""
    warnings.simplefilter("ignore")
    # The real standard output is for replies alone; C++ libraries write to file descriptor 1 too.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(module, sys.stdin, replies)


def serve(module: str, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the input ends."""
    engine: Any = None
    settings: list[Setting] = []
    for line in requests:
        request = json.loads(line)
        try:
            if engine is None:
                job = Job.from_dict(request)
                settings = list(job.settings)
                engine = importlib.import_module(module).Engine(job)
                reply: dict[str, Any] = {"build": getattr(engine, "build", None)}
            else:
                setting = settings[request["setting"]]
                run = engine.answer(setting, request["prompt"], request["max_new_tokens"])
                reply = dataclasses.asdict(run)
        except Exception as error:  # any error of the library is the reason that the row shows
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if engine is None:
            return


class Baseline:
    """A system in other processes, which run within a `with` block.

    Args:
        name: of `BASELINES`.
        job: see `Job`.
        failure: reason why it cannot take part; then no process is started, and each answer fails.

    Attributes:
        build: the library's build flags, once it has started; None where it reports none.
    """

    def __init__(self, name: str, job: Job, failure: str | None = None) -> None:
        spec = BASELINES[name]
        self.name, self.settings = name, job.settings
        self.build: str | None = None
        self._failure = failure
        groups = [[one] for one in job.settings] if spec.process_per_setting else [job.settings]
        self._processes = [
            _Process(spec.module, dataclasses.replace(job, settings=group)) for group in groups
        ]

    def __enter__(self) -> "Baseline":
        with contextlib.ExitStack() as stack:
            if self._failure is None:
                for process in self._processes:
                    self.build = stack.enter_context(process).build or self.build
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        if self._failure is not None:
            raise SystemFailedError(self._failure)
        process = next(one for one in self._processes if setting in one.settings)
        reply = process.request(
            {
                "setting": process.settings.index(setting),
                "prompt": list(prompt),
                "max_new_tokens": max_new_tokens,
            }
        )
        steps = tuple(Step(tuple(step["tokens"])) for step in reply.pop("steps"))
        return Run(steps=steps, **reply)


class _Process:
    """A process that answers with some settings of a baseline. After a failure it stays failed."""

    def __init__(self, module: str, job: Job) -> None:
        self.settings = list(job.settings)
        self._module, self._job = module, job
        self._failure: str | None = None
        self.build: str | None = None

    def __enter__(self) -> "_Process":
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # for its children, from Python 3.11 on
        )
        try:
            self.build = self.request(dataclasses.asdict(self._job))["build"]
        except SystemFailedError as error:
            self._failure = str(error)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            SystemFailedError: the library raised an error, or the process has ended.
        """
        if self._failure is not None:
            raise SystemFailedError(self._failure)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # a broken pipe, which Windows calls an invalid argument
            line = ""
        if not line:
            self._log.seek(0)
            log = [text.strip() for text in self._log if text.strip()]
            status = f"its process ended with status {process.wait()}"
            self._failure = ": ".join([status, *log[-1:]])
            raise SystemFailedError(self._failure)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SystemFailedError(reply["error"])
        return reply


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
    gguf_weights: str | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[Baseline]]:
    """Start the processes of each baseline; all of them end with the context.

    The list has baselines that cannot take part too (not installed, a file that they cannot read); each
    of their answers fails with the reason.

    Args:
        model: this package's, whose precision, device and end tokens all use.
        names: of `BASELINES`.
        source: the checkpoint's name.
        drafts: pairs (E, d) of self-speculative decoding to compare with.
        context: number of tokens of the longest prompt and its answer.
        stop: texts that end an answer.
        ignore_eos: answers continue after an end token.
        gguf_weights: precision of llama.cpp's file, see `export.to_gguf`.
        progress: called with the number that have started, and in all.
    """
    with contextlib.ExitStack() as stack:
        baselines: list[Baseline] = []
        if names:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="layerskip-baselines-"))
            job = Job(
                model=str(resolve(source)),
                tokenizer=None if model.tokenizer is None else folder,
                gguf=str(Path(folder) / "model.gguf"),
                dtype=model.decoder.dtype_name,
                device=str(model.decoder.device),
                threads=native.num_threads_to_use(),  # as many as the kernels
                context=context,
                eos_token_ids=() if ignore_eos else sorted(model.end_tokens),
                stop=tuple(stop),
            )
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
        for name in names:
            progress(len(baselines), len(names))
            failure = _prepare(name, job, gguf_weights)
            settings = importlib.import_module(BASELINES[name].module).settings(drafts)
            baseline = Baseline(name, dataclasses.replace(job, settings=settings), failure)
            baselines.append(stack.enter_context(baseline))
            progress(len(baselines), len(names))
        yield baselines


def _prepare(name: str, job: Job, gguf_weights: str | None) -> str | None:
    """Make the files that a baseline needs; return the reason why it cannot take part, or None."""
    spec = BASELINES[name]
    if importlib.util.find_spec(spec.package) is None:
        return f"{spec.distribution} is not installed; run: pip install 'layerskip[baselines]'"
    if name == "llama.cpp":
        from layerskip.export import open_source, to_gguf

        try:
            to_gguf(open_source(job.model), Path(job.gguf), weights=gguf_weights)
        except ValueError as error:
            return f"no GGUF file can be made of this checkpoint: {error}"
    return None
