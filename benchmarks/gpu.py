"""Test and measure layerskip on a machine with a CUDA GPU, unattended, within eight minutes.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

The machine needs Python 3.10+, PyTorch with CUDA and this checkout. Other dependencies that are missing
are installed with pip into the running environment (--no-install prevents it).

Every part runs in a process of its own with a time limit; the result is written after each part, and
after every row within a part. A part that fails or exceeds its limit keeps its rows and gets an
`error`. The parts, in order:

    tests        the tests marked `gpu` (tests/gpu)
    bandwidth    bytes/s of a copy kernel and of a reduction; the ceiling of plain decoding
    NAME         each built-in model: greedy identity in float32, then bfloat16 plain, fixed
                 self-speculative and auto tokens/s against the ceiling
    SHAPE        random weights in the shape of a 1B and an 8B Llama, bfloat16, created on the GPU:
                 plain and self-speculative decoding with scripted acceptance
    ... compiled the same with `torch.compile` (compile=True)

Scripted acceptance: in the random-weight models, only the last layer changes what an early exit
predicts, and its output is scaled so that the exit agrees with the last layer at a given share of
positions. All layers run, and all weights are read, as in a trained model. The acceptance that
decoding then has is in the row.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
BUILTIN_MODELS = ("smollm2-135m-topv2", "smollm2-135m")
PROMPT = "def fibonacci(n):\n    "
# Vocabulary, hidden size, MLP width, layers, heads, KV heads, tied head.
SHAPES = {
    "tiny": (512, 64, 96, 4, 4, 2, True),  # dry run on a CPU
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False),
}
AGREEMENT = (0.6, 0.8, 0.9)
EXIT_FRACTION = 1 / 8
DRAFT_TOKENS = 4
PROMPT_TOKENS = 128
REPEATS = 3
DEPENDENCIES = (
    *("click", "gguf", "huggingface_hub", "jinja2", "numpy", "platformdirs", "rich"),
    *("safetensors", "transformers", "pytest", "hypothesis"),
)
Report = Callable[[dict[str, Any]], None]


def main() -> None:
    options = _options()
    if options.part:
        _run_part(options)
        return
    deadline = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])}
    result["parts"] = {}
    for name, limit in _parts(options):
        seconds = min(limit, deadline - time.monotonic())
        print(f"{name}: ", end="", flush=True)
        if seconds < 5:
            part: dict[str, Any] = {"error": "no time left"}
        elif name == "install":
            part = _install(seconds)
        else:
            part = _in_subprocess(name, seconds, options)
        result["parts"][name] = part
        _write(options.output, result)
        print(part.get("error", "ok"), f"({part.get('seconds', 0):.0f} s)", flush=True)
    print(f"results: {options.output}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(BUILTIN_MODELS), help="comma-separated")
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-3-8b", help=", ".join(SHAPES))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--no-install", action="store_true", help="do not run pip")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models, options.shapes = (
        [name for name in text.split(",") if name] for text in (options.models, options.shapes)
    )
    if unknown := sorted({*options.shapes} - {*SHAPES}):
        parser.error(f"unknown shape {unknown[0]}; choose from {', '.join(SHAPES)}")
    return options


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yield the name of each part and its limit in seconds, the most informative parts first."""
    if not options.no_install and _missing_packages():
        yield "install", 120
    yield "bandwidth", 30
    yield "tests", 120
    for name in options.models:
        yield name, 60
    for shape in options.shapes:
        yield shape, 60
    if options.device == "cpu":  # compile=True selects the CPU kernels there
        return
    for name in [*options.models[:1], *options.shapes]:
        yield f"{name} compiled", 90


# --- processes


def _missing_packages() -> list[str]:
    return [name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]


def _install(seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "-e", str(ROOT)]
    command += ["pytest", "hypothesis"]
    return _run(command, seconds)


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command in its own process group, and kill the group after some seconds."""
    began = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        error = None
        try:
            if status := process.wait(seconds):
                error = f"exit status {status}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    result: dict[str, Any] = {"seconds": time.monotonic() - began}
    if error:
        last = next((line for line in reversed(lines) if not line.startswith("[")), "")
        result |= {"error": f"{error}: {last}" if last else error, "log": lines[-40:]}
    return result


def _in_subprocess(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a fresh process; the rows written before a failure are kept."""
    with tempfile.TemporaryDirectory(prefix="layerskip-gpu-") as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", name, "--output", str(file)]
        command += ["--device", options.device, "--new-tokens", str(options.new_tokens)]
        outcome = _run(command, seconds)
        document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {**document, **outcome}


def _run_part(options: argparse.Namespace) -> None:
    document: dict[str, Any] = {"rows": []}

    def report(row: dict[str, Any]) -> None:
        document["rows"].append(row)
        _write(options.output, document)

    for key, value in measure_part(options.part, options.device, options.new_tokens, report):
        document[key] = value
        _write(options.output, document)


def _write(output: Path, document: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f"{output.name}.tmp")
    draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draft.replace(output)


# --- measurements, in the process of a part: from here on layerskip and PyTorch are imported


def measure_part(
    name: str, device: str, new_tokens: int, report: Report
) -> Iterator[tuple[str, Any]]:
    """Run a part; rows go to `report`, and further entries of its document are yielded."""
    compiled = name.endswith(" compiled")
    subject = name.removesuffix(" compiled")
    if subject == "tests":
        run_tests(report)
    elif subject == "bandwidth":
        yield "environment", environment(device)
        report(bandwidth(device))
    elif subject in SHAPES:
        yield "environment", environment(device)
        measure_shape(subject, device, new_tokens, report, compiled=compiled)
    else:
        yield "environment", environment(device)
        measure_model(subject, device, new_tokens, report, compiled=compiled)


def environment(device: str) -> dict[str, Any]:
    """Describe the machine, versions and commit."""
    import torch

    from layerskip.bench import machine

    return machine.environment(dtype=torch.bfloat16, device=device)


def run_tests(report: Report) -> None:
    """Run the tests marked `gpu`; raises SystemExit if one fails."""
    command = [
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-rA",
        str(ROOT / "tests/gpu"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    for line in lines:
        outcome, _, test = line.partition(" ")
        if outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
            report({"test": test, "outcome": outcome.lower()})
    if done.returncode:
        print("\n".join(lines[-30:]), done.stderr[-2000:])
        raise SystemExit(done.returncode)


def bandwidth(device: str, n_bytes: int | None = None) -> dict[str, Any]:
    """Measure bytes/s of a device-to-device copy (reads and writes counted) and of a sum."""
    import torch

    if n_bytes is None:
        free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else 2**28
        n_bytes = min(2**31, free // 4)
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {"copy": [], "sum": []}
    for _ in range(10):
        times["copy"].append(_seconds(device, lambda: target.copy_(source)))
        times["sum"].append(_seconds(device, source.sum))
    return {
        "copy_gb_per_s": 2 * n_bytes / statistics.median(times["copy"]) / 1e9,
        "read_gb_per_s": n_bytes / statistics.median(times["sum"]) / 1e9,
    }


def _seconds(device: str, function: Callable[[], object]) -> float:
    import torch

    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def measure_model(
    name: str, device: str, new_tokens: int, report: Report, *, compiled: bool
) -> None:
    """Measure a checkpoint: greedy identity, then speed in bfloat16 by mode."""
    from layerskip import LayerSkipModel

    for dtype in ("float32", "bfloat16"):
        model = LayerSkipModel.from_pretrained(name, dtype=dtype, device=device, compile=compiled)
        num_layers = len(model.decoder.layers)
        exit_layer = model.settings.exit_layer or max(1, round(EXIT_FRACTION * num_layers))
        prompt = PROMPT if model.tokenizer is not None else [1, 2, 3]
        fixed = {"exit_layer": exit_layer, "draft_tokens": DRAFT_TOKENS}
        modes = {
            "plain": {"mode": "plain"},
            "self-speculative": {"mode": "self-speculative", **fixed},
            "auto": {"mode": "auto"},
        }
        _compare(model, prompt, modes, new_tokens, report, {"dtype": dtype})


def measure_shape(
    shape: str, device: str, new_tokens: int, report: Report, *, compiled: bool
) -> None:
    """Measure random weights in a shape: plain decoding, then drafts of scripted acceptance."""
    import torch

    exit_layer = exit_layer_of(shape)
    agreements = (0.8,) if compiled else AGREEMENT  # compilation takes most of the time
    model = random_model(shape, device, 1.0, compiled=False)
    scales = {a: scale_for(model, a, exit_layer) for a in agreements}
    del model
    fixed = {"exit_layer": exit_layer, "draft_tokens": DRAFT_TOKENS}
    modes = {
        "plain": {"mode": "plain"},
        "self-speculative": {"mode": "self-speculative", **fixed},
    }
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(SHAPES[shape][0], (PROMPT_TOKENS,), generator=generator).tolist()
    for agreement, scale in scales.items():
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        model = random_model(shape, device, scale, compiled=compiled)
        details = {"shape": shape, "scripted_agreement": agreement, **fixed}
        _compare(model, prompt, modes, new_tokens, report, details)
        del model


def _compare(
    model: Any,
    prompt: Any,
    modes: Mapping[str, dict[str, Any]],
    new_tokens: int,
    report: Report,
    details: dict[str, Any],
) -> None:
    """Report tokens/s of each mode, interleaved, against the ceiling and against plain decoding."""
    decoder = model.decoder
    device = str(decoder.device)
    measured = bandwidth(device)
    ceiling = 1e9 * max(measured.values()) / decoder.weight_bytes
    common = {"max_new_tokens": new_tokens, "ignore_eos": True}
    answers: dict[str, list[Any]] = {mode: [] for mode in modes}
    for repeat in range(REPEATS + 1):
        for mode, settings in modes.items():
            answer = model.generate(prompt, **settings, **common)
            if repeat:  # the first round warms up and compiles
                answers[mode].append(answer)
    plain = answers["plain"][0]
    plain_speed = statistics.median(a.tokens_per_s for a in answers["plain"])
    for mode, runs in answers.items():
        speed = statistics.median(a.tokens_per_s for a in runs)
        row = {
            **details,
            "mode": mode,
            "kernels": decoder.kernels,
            "tokens_per_s": speed,
            "speedup": speed / plain_speed,
            "prefill_s": statistics.median(a.ttft_s for a in runs),
            "identical_to_plain": all(a.token_ids == plain.token_ids for a in runs),
            "ceiling_tokens_per_s": ceiling,
            "share_of_ceiling": speed / ceiling,
            "weight_bytes": decoder.weight_bytes,
            **measured,
        }
        if mode != "plain":
            row["acceptance_rate"] = runs[0].acceptance_rate
            row["mean_accepted_length"] = runs[0].mean_accepted_length
        report(row)


# --- random weights


def exit_layer_of(shape: str) -> int:
    """E: an eighth of the layers, at least 1."""
    return max(1, round(EXIT_FRACTION * SHAPES[shape][3]))


class RandomTensors:
    """A checkpoint whose tensors are created on the device when they are read.

    It implements `layerskip.model.weights.Tensors`. The MLPs of the layers before the exit make the next
    token a pseudo-random function of the last one. All other residual contributions are too small to
    change a hidden state, except the MLP output of the last layer, which is multiplied by `scale`.
    """

    rotary_layout = "halves"

    def __init__(self, shape: str, device: str, scale: float) -> None:
        import torch

        vocabulary, hidden, mlp, layers, heads, kv_heads, tied = SHAPES[shape]
        head_dim = hidden // heads
        self.paths: list[Path] = []
        self._exit_layer, self._last, self._scale = exit_layer_of(shape), layers - 1, scale
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
        if not tied:
            self._shapes["lm_head.weight"] = (vocabulary, hidden)
        for i in range(layers):
            for name, size in {
                "self_attn.q_proj": (heads * head_dim, hidden),
                "self_attn.k_proj": (kv_heads * head_dim, hidden),
                "self_attn.v_proj": (kv_heads * head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * head_dim),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items():
                self._shapes[f"model.layers.{i}.{name}.weight"] = size

    def names(self) -> set[str]:
        """See `Tensors`."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return self._shapes[name]

    def stored_as(self, name: str) -> str:
        """See `Tensors`."""
        return "BF16"

    def quantized(self, name: str) -> None:
        """See `Tensors`."""

    def release(self) -> None:
        """Do nothing: see `Tensors`."""

    def read(self, name: str, dtype: Any = None) -> Any:
        """See `Tensors`."""
        import torch

        dtype = dtype or torch.bfloat16
        tensor = torch.empty(self._shapes[name], dtype=torch.bfloat16, device=self._device)
        if tensor.ndim == 1:
            return tensor.fill_(1.0).to(dtype)
        std = tensor.shape[1] ** -0.5
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            std = 0.02
        elif name.endswith("o_proj.weight"):
            std = 1e-12
        elif name.endswith("down_proj.weight"):
            layer = int(name.split(".")[2])
            if layer == self._last:
                std *= self._scale
            elif layer >= self._exit_layer:
                std = 1e-12
        return tensor.normal_(0.0, std, generator=self._generator).to(dtype)


def random_model(shape: str, device: str, scale: float, *, compiled: bool) -> Any:
    """Build a model without a tokenizer from `RandomTensors`, in bfloat16."""
    import torch

    from layerskip import LayerSkipModel
    from layerskip.model import Checkpoint, CheckpointSettings
    from layerskip.model.families import from_config
    from layerskip.model.loader import build

    vocabulary, hidden, mlp, layers, heads, kv_heads, tied = SHAPES[shape]
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": tied,
    }
    decoder = build(
        from_config(config),
        RandomTensors(shape, device, scale),
        tied=tied,
        dtype=torch.bfloat16,
        device=torch.device(device),
        compiled=compiled,
    )
    return LayerSkipModel(
        Checkpoint(path=Path(shape), decoder=decoder, tokenizer=None, settings=CheckpointSettings())
    )


def scale_for(model: Any, agreement: float, exit_layer: int) -> float:
    """Find the scale of the last layer at which exit E agrees at this share of positions.

    The last layer adds `scale` times its output at scale 1 to the hidden state of the exit, so that all
    scales are evaluated from one pass.
    """
    import torch

    decoder = model.decoder
    vocabulary, context = decoder.architecture.vocab_size, 64
    generator = torch.Generator().manual_seed(1)
    early, added = [], []
    with torch.inference_mode():
        for _ in range(8):
            tokens = torch.randint(vocabulary, (1, context), generator=generator)
            tokens = tokens.to(decoder.device)
            for _ in range(4):  # the tokens that decoding reaches are not uniform
                cache = decoder.new_cache(context)
                hidden = decoder.run(decoder.embed(tokens), 0, exit_layer, cache)
                tokens = decoder.logits(hidden).argmax(-1)
            last = decoder.run(hidden, exit_layer, len(decoder.layers), cache)
            early.append(hidden)
            added.append(last - hidden)
        predicted = [decoder.logits(hidden).argmax(-1) for hidden in early]

        def agrees(scale: float) -> float:
            shares = [
                (decoder.logits(hidden + scale * change).argmax(-1) == token).float().mean()
                for hidden, change, token in zip(early, added, predicted, strict=True)
            ]
            return float(torch.stack(shares).mean())

        low, high = 0.0, 1.0
        while agrees(high) > agreement and high < 1024:
            low, high = high, 2 * high
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if agrees(middle) > agreement else (low, middle)
    return high


if __name__ == "__main__":
    main()
