"""Load and soak of `layerskip serve`, beside llama.cpp's server and vLLM on the same weights.

    LAYERSKIP_DATA=data python benchmarks/serve.py --model smollm2-135m-topv2 --task topv2 \\
        --systems layerskip,layerskip-plain,llama.cpp,vllm --vllm-python venv/bin/python \\
        --output benchmarks/results/serve-load.json
    LAYERSKIP_DATA=data python benchmarks/serve.py --soak 30 --output benchmarks/results/serve-soak.json
    LAYERSKIP_DATA=data python benchmarks/serve.py --kill 5

All servers run from the beginning to the end, and those that are not measured are stopped (SIGSTOP). At
each load the systems alternate. Prompts are token ids, the same for all; answers are greedy and end
where the model ends them. `ttft` is the time to the first text, `inter_token` that between later
tokens, of each answer: (end - first text) / (tokens - 1). llama.cpp gets the weights in their stored
format, vLLM in bfloat16.

The closed loop (`--clients`) keeps that many requests running; the open loop (`--rates`) submits
requests at random times (Poisson), whether or not earlier ones have ended.

--soak runs clients that disconnect, send oversized or malformed bodies, read slowly, or ask and compare
the answer with that of `generate`. --kill kills the server under load and starts it again.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import comma_separated, environment_of, parse, run, write

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task

SYSTEMS = ("layerskip", "layerskip-plain", "llama.cpp", "vllm")
START_S = 600  # vLLM compiles
MAX_PROMPT_TOKENS = 1024
CONTEXT = 2048  # positions of an answer in the other servers
READ_S = 120  # without any byte an answer counts as lost
_LLAMA_CPP = """
import sys, time, xllamacpp
path, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = path, ["127.0.0.1"], port
params.n_parallel, params.n_ctx, params.fit_params = slots, slots * context, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_gpu_layers, params.ui, params.verbosity = 0, False, 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(10**9)
"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a task, and how its answers end."""

    ids: list[int]
    max_tokens: int
    stop: tuple[str, ...]


@dataclasses.dataclass
class Reply:
    """A streamed answer: its text, number of tokens, and the times of its pieces."""

    submitted: float
    text: str = ""
    tokens: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


class ServerProcess:
    """A server in a process group of its own."""

    def __init__(self, command: Sequence[str], port: int, env: dict[str, str], log: Path) -> None:
        self.port, self._command, self._env, self._log = port, list(command), env, log
        self.start()

    def start(self) -> None:
        """Start the process."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until /health is 200."""
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                if asyncio.run(_get(self.port, "/health")) == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > until:
                raise ValueError(f"{self._command[:3]} has not started; see {self._log}")
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def resident_mib(self) -> float:
        """Return the resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()


# --- HTTP ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _request(
    port: int, method: str, path: str, body: bytes = b""
) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """Send a request and yield status and body; a library would take CPU time from the servers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        head = (
            f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status = await asyncio.wait_for(reader.readline(), READ_S)
        while (await reader.readline()).strip():
            pass
        yield int(status.split()[1]), reader
    finally:
        writer.close()


async def _get(port: int, path: str) -> int:
    async with _request(port, "GET", path) as (status, _):
        return status


async def ask(port: int, model: str, prompt: Prompt, pause_s: float = 0.0) -> Reply:
    """Ask for a streamed greedy completion; a pause after each event makes a slow reader."""
    body = {
        "model": model,
        "prompt": prompt.ids,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    reply = Reply(time.perf_counter())
    try:
        async with _request(port, "POST", "/v1/completions", json.dumps(body).encode()) as (
            status,
            reader,
        ):
            if status != 200:
                reply.error = f"status {status}: {(await reader.read(500)).decode()}"
            is_whole = False
            while line := await asyncio.wait_for(reader.readline(), READ_S):
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    is_whole = True
                    break
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    reply.error = event["error"]["message"]
                for choice in event.get("choices", ()):
                    if choice.get("text"):
                        reply.text += choice["text"]
                        reply.times.append(time.perf_counter())
                if "timings" in event:  # llama.cpp's
                    reply.tokens = event["timings"]["predicted_n"]
                if event.get("usage"):
                    reply.tokens = event["usage"]["completion_tokens"]
                await asyncio.sleep(pause_s)
            if not is_whole and reply.error is None:
                reply.error = "the answer was cut off"
    except (OSError, ValueError, IndexError, asyncio.TimeoutError) as error:
        reply.error = f"connection: {error or type(error).__name__}"
    return reply


# --- load ---------------------------------------------------------------------------------------


async def closed_loop(
    port: int, model: str, prompts: Sequence[Prompt], clients: int
) -> list[Reply]:
    """Keep some requests running until all prompts are answered."""
    waiting, replies = iter(prompts), list[Reply]()

    async def client() -> None:
        for prompt in waiting:
            replies.append(await ask(port, model, prompt))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def open_loop(
    port: int, model: str, prompts: Sequence[Prompt], rate: float, seed: int
) -> list[Reply]:
    """Submit requests at the times of a Poisson process, the same for each system."""
    generator = random.Random(seed)
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(ask(port, model, prompt)))
        await asyncio.sleep(generator.expovariate(rate))
    return await asyncio.gather(*tasks)


def row_of(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Return the figures of one load."""
    good = [reply for reply in replies if reply.error is None]
    with_text = [reply for reply in good if reply.times]  # others ended at once
    per_token = [
        (one.times[-1] - one.times[0]) / (one.tokens - 1) for one in with_text if one.tokens > 1
    ]
    tokens = sum(one.tokens for one in good)
    errors = Counter(one.error for one in replies if one.error)
    return {
        "requests": len(replies),
        "errors": dict(errors),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        **_percentiles("ttft_ms", [one.times[0] - one.submitted for one in with_text]),
        **_percentiles("inter_token_ms", per_token),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if len(seconds) < 2:
        return {f"{name}_p50": None, f"{name}_p95": None}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {f"{name}_p50": round(1e3 * cuts[9], 2), f"{name}_p95": round(1e3 * cuts[18], 2)}


def load(options: argparse.Namespace, model: LayerSkipModel, folder: Path) -> list[dict[str, Any]]:
    """Measure all systems at all loads."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        servers = dict(_start_all(options, folder, stack))
        for server in servers.values():
            server.wait_until_ready()
            server.signal(signal.SIGSTOP)
        for task in options.task:
            loads: list[tuple[str, float]] = [("warm-up", 2)]
            loads += [("clients", n) for n in options.clients]
            loads += [("rate", rate) for rate in options.rates]
            n = options.requests
            # Every load has prompts of its own: servers keep the prefixes of earlier ones.
            all_prompts = prompts_of(task, model, n * len(loads))
            random.Random(0).shuffle(all_prompts)
            for i, (kind, value) in enumerate(loads):
                prompts = all_prompts[i * n : (i + 1) * n]
                for name in sorted(
                    servers, key=lambda one: random.Random(f"{one}{value}").random()
                ):
                    server, api_name = servers[name], _api_name(name, folder)
                    server.signal(signal.SIGCONT)
                    started = time.perf_counter()
                    if kind == "rate":
                        going = open_loop(server.port, api_name, prompts, value, seed=0)
                    else:
                        some = prompts[:4] if kind == "warm-up" else prompts
                        going = closed_loop(server.port, api_name, some, int(value))
                    replies = asyncio.run(going)
                    seconds = time.perf_counter() - started
                    server.signal(signal.SIGSTOP)
                    if kind == "warm-up":
                        continue
                    row = {"system": name, "task": task, kind: value, **row_of(replies, seconds)}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if options.output:
                        write({"environment": _environment(model), "rows": rows}, options.output)
    return rows


def _start_all(
    options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> Iterator[tuple[str, ServerProcess]]:
    for name in options.systems:
        port = _free_port()
        command, env = _command(name, options, folder, port)
        server = ServerProcess(command, port, env, options.logs / f"{name}.log")
        stack.callback(server.close)
        yield name, server


def _command(
    name: str, options: argparse.Namespace, folder: Path, port: int
) -> tuple[list[str], dict[str, str]]:
    threads, slots = str(options.threads), str(max([*options.clients, 16]))
    if name.startswith("layerskip"):
        return serve_command(
            options, port, ["--mode", "plain"] if name.endswith("plain") else []
        ), {}
    if name == "llama.cpp":
        gguf = folder / "model.gguf"
        _export(options, "gguf", gguf)
        if options.llama_server:
            command = [options.llama_server, "-m", str(gguf), "--port", str(port), "-fa", "on"]
            command += ["-np", slots, "-c", str(int(slots) * CONTEXT)]
            return [*command, "-t", threads, "-tb", threads, "--no-webui"], {}
        return [
            sys.executable,
            "-c",
            _LLAMA_CPP,
            str(gguf),
            str(port),
            threads,
            slots,
            str(CONTEXT),
        ], {}
    _export(options, "hf", folder / "hf")
    command = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "hf"), "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", slots]
    command += ["--generation-config", "vllm"]
    return command, {
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def serve_command(options: argparse.Namespace, port: int, flags: Sequence[str]) -> list[str]:
    """Return the command of a server of ours."""
    command = [sys.executable, "-m", "layerskip", "serve", "--model", options.model]
    command += ["--served-model-name", "model", "--port", str(port)]
    return [*command, "--threads", str(options.threads), *flags]


def _api_name(system: str, folder: Path) -> str:
    return str(folder / "hf") if system == "vllm" else "model"


def _export(options: argparse.Namespace, kind: str, path: Path) -> None:
    command = [sys.executable, "-m", "layerskip", "export", "--model", options.model]
    subprocess.run([*command, "--to", kind, str(path)], check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def prompts_of(task: str, model: LayerSkipModel, count: int) -> list[Prompt]:
    """Return token ids of a task's prompts, as `layerskip bench` would give them."""
    loaded = load_task(task, samples=2 * count, chat=model.has_chat_template, judged=False)
    prompts = []
    for sample in loaded.samples:
        ids = model.tokenize(sample.prompt)
        if len(ids) <= MAX_PROMPT_TOKENS:
            prompts.append(Prompt(ids, min(loaded.max_new_tokens, 128), tuple(loaded.stop)))
    return prompts[:count]


# --- soak ---------------------------------------------------------------------------------------


class Soak:
    """Clients of all kinds, and what became of their requests."""

    def __init__(self, port: int, prompts: Sequence[Prompt], expected: Sequence[str]) -> None:
        self.port, self.outcomes = port, Counter[str]()
        self._pairs = list(zip(prompts, expected, strict=True))
        self.wrong: list[dict[str, str]] = []

    async def client(self, seed: int, until: float) -> None:
        """Send requests of random kinds until a time."""
        generator = random.Random(seed)
        kinds: list[tuple[Callable[..., Any], int]] = [
            (self.answered, 8),
            (self.slow, 1),
            (self.leaves, 4),
            (self.oversized, 1),
            (self.malformed, 2),
        ]
        choices, weights = zip(*kinds, strict=True)
        while time.monotonic() < until:
            kind = generator.choices(choices, weights)[0]
            await kind(generator)

    async def answered(self, generator: random.Random, pause_s: float = 0.0) -> None:
        """Compare an answer with that of `generate`."""
        prompt, expected = generator.choice(self._pairs)
        reply = await ask(self.port, "model", prompt, pause_s)
        if reply.error is not None:
            kind = "refused" if "429" in reply.error else reply.error.split(":")[0]
            self.outcomes[f"error: {kind}"] += 1
        elif reply.text == expected:
            self.outcomes["right answer"] += 1
        else:
            self.outcomes["WRONG ANSWER"] += 1
            self.wrong.append({"expected": expected, "answer": reply.text})

    async def slow(self, generator: random.Random) -> None:
        """Read slowly."""
        await self.answered(generator, pause_s=0.1)

    async def leaves(self, generator: random.Random) -> None:
        """Disconnect at a random time."""
        prompt, _ = generator.choice(self._pairs)
        going = ask(self.port, "model", dataclasses.replace(prompt, max_tokens=128))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(going, generator.expovariate(4))
        self.outcomes["left"] += 1

    async def oversized(self, generator: random.Random) -> None:
        """Send a body beyond the limit."""
        await self._refused(b"x" * generator.randrange(5 << 20, 8 << 20), 413)

    async def malformed(self, generator: random.Random) -> None:
        """Send bytes that are no request."""
        body = bytearray(b'{"prompt": "x", "max_tokens": 4}')
        body[generator.randrange(len(body) - 6)] = 0xFF
        await self._refused(bytes(body), 400)

    async def _refused(self, body: bytes, expected: int) -> None:
        try:
            async with _request(self.port, "POST", "/v1/completions", body) as (status, _):
                name = "refused as it should be" if status == expected else f"STATUS {status}"
                self.outcomes[name] += 1
        except (OSError, ValueError, IndexError) as error:
            self.outcomes[f"error: connection {type(error).__name__}"] += 1


def soak(options: argparse.Namespace, model: LayerSkipModel) -> dict[str, Any]:
    """Run clients of all kinds, with the server's memory every few seconds."""
    server, state = _soaked(options, model)
    memory: list[tuple[float, float]] = []
    started = time.monotonic()
    until = started + 60 * options.soak

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append((round(time.monotonic() - started, 1), round(server.resident_mib(), 1)))
            await asyncio.sleep(max(0.2, options.soak * 60 / 360))

    async def all_clients() -> None:
        clients = (state.client(seed, until) for seed in range(options.soak_clients))
        await asyncio.gather(watch(), *clients)

    try:
        asyncio.run(all_clients())
        health = asyncio.run(_get(server.port, "/health"))
    finally:
        server.close()
    thirds = [
        statistics.mean(
            mib for at, mib in memory if i / 3 <= at / (60 * options.soak) < (i + 1) / 3
        )
        for i in range(3)
    ]
    return {
        "minutes": options.soak,
        "clients": options.soak_clients,
        "outcomes": dict(state.outcomes),
        "wrong": state.wrong[:5],
        "health_at_the_end": health,
        "memory_mib_by_third": [round(third, 1) for third in thirds],
        "last_third_over_second": round(thirds[2] / thirds[1], 4),
        "memory_mib": memory,
    }


def kill(options: argparse.Namespace, model: LayerSkipModel) -> dict[str, Any]:
    """Kill the server under load and start it again, some times."""
    server, state = _soaked(options, model)

    async def clients(until: float) -> None:
        async def one(seed: int) -> None:
            generator = random.Random(seed)
            while time.monotonic() < until:
                await state.answered(generator)
                await asyncio.sleep(0.05)

        await asyncio.gather(*(one(seed) for seed in range(options.soak_clients)), killer(until))

    async def killer(until: float) -> None:
        await asyncio.sleep((until - time.monotonic()) / 2)
        server.signal(signal.SIGKILL)
        server.process.wait()
        server.start()

    try:
        for _ in range(options.kill):
            asyncio.run(clients(time.monotonic() + 10))
            server.wait_until_ready()
    finally:
        server.close()
    return {"kills": options.kill, "outcomes": dict(state.outcomes), "wrong": state.wrong[:5]}


def _soaked(options: argparse.Namespace, model: LayerSkipModel) -> tuple[ServerProcess, Soak]:
    """Start a server in float32, where answers do not depend on what runs beside them."""
    port = _free_port()
    command = serve_command(options, port, ["--dtype", "float32", "--weights", "16bit"])
    server = ServerProcess(command, port, {}, options.logs / "soak.log")
    prompts = [one for task in options.task for one in prompts_of(task, model, options.requests)]
    prompts = [dataclasses.replace(one, max_tokens=min(one.max_tokens, 48)) for one in prompts]
    expected = [
        model.generate(one.ids, max_new_tokens=one.max_tokens, stop=one.stop).text
        for one in prompts
    ]
    try:
        server.wait_until_ready()
    except BaseException:
        server.close()
        raise
    return server, Soak(port, prompts, expected)


def _environment(model: LayerSkipModel) -> dict[str, Any]:
    return environment_of("benchmarks/serve.py", model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--systems", type=comma_separated, default=list(SYSTEMS[:3]))
    parser.add_argument("--task", type=comma_separated, default=["spec_bench"])
    parser.add_argument("--requests", type=int, default=48, help="prompts of each load")
    parser.add_argument("--clients", type=_numbers(int), default=[1, 2, 4, 8, 16])
    parser.add_argument("--rates", type=_numbers(float), default=[], help="requests a second")
    parser.add_argument(
        "--llama-server", metavar="PROGRAM", help="of a build of llama.cpp; default: xllamacpp's"
    )
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--soak-clients", type=int, default=8)
    parser.add_argument("--kill", type=int, metavar="TIMES")
    parser.add_argument("--logs", type=Path, help="folder for the output of the servers")
    options = parse(parser)
    unknown = set(options.systems) - set(SYSTEMS)
    if unknown or ("vllm" in options.systems and not (options.vllm_python or options.soak)):
        parser.error(f"systems are {', '.join(SYSTEMS)}; vllm needs --vllm-python")
    # The soak compares texts, for which both have to compute in float32 with the same weights.
    exact = options.soak or options.kill
    same = {"dtype": "float32", "weights": "16bit"} if exact else {}
    model = LayerSkipModel.from_pretrained(options.model, **same)
    with tempfile.TemporaryDirectory() as name:
        options.logs = options.logs or Path(name)
        options.logs.mkdir(parents=True, exist_ok=True)
        if exact:
            part = soak if options.soak else kill
            result = part(options, model)
            shown = {key: value for key, value in result.items() if key != "memory_mib"}
            print(json.dumps(shown, indent=1))
            if options.output:
                write({"environment": _environment(model), **result}, options.output)
        else:
            load(options, model, Path(name))


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in comma_separated(text)]


if __name__ == "__main__":
    run(main)
