"""Compare weights kept as a GGUF file stores them with llama.cpp on the same file.

    python benchmarks/stored_weights.py a.gguf b.gguf --output benchmarks/results/stored-weights.json
    python benchmarks/stored_weights.py --make smollm2-135m.gguf smollm2-q4_k_m.gguf

Each system runs in a process of its own; they take turns. Reported are the medians of plain decoding
(128 tokens) and of the prefill of 512 tokens in tokens/s, the time to load, the resident memory
afterwards, and the cost of a pass over five positions in units of one. llama.cpp runs through xllamacpp
with flash attention; with --llama-bench also as another build's program, and the faster one counts in
each ratio. --make writes a Q4_K_M file with the quantizer and the rules of llama.cpp.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import deliver, environment, interleaved, llama_bench, ms_of, parse, run, verify
from gguf import GGMLQuantizationType as Kind

from layerskip import LayerSkipModel
from layerskip.bench.baselines import llama_cpp
from layerskip.bench.baselines.process import Job
from layerskip.bench.measure import Setting
from layerskip.model import native
from layerskip.model.weights import GgufFile

NEW_TOKENS, PROMPT_TOKENS = 128, 512
SYSTEMS = ("layerskip", "llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", action="store_true", help="write the second file from the first")
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="of a build of llama.cpp")
    parser.add_argument("--serve", choices=SYSTEMS, help="internal: one system's process")
    options = parse(parser)
    if options.make:
        make_q4_k_m(*options.files)
    elif options.serve:
        serve(options.serve, options.files[0], options.threads)
    else:
        result = {
            "environment": environment(
                "benchmarks/stored_weights.py", "bfloat16", weights="stored"
            ),
            "rounds": options.rounds,
            "files": {
                file.stem: compare(file, options.rounds, options.threads, options.llama_bench)
                for file in options.files
            },
        }
        deliver(result, options.output)


def compare(file: Path, rounds: int, threads: int, program: str | None) -> dict[str, Any]:
    """Return the figures of all systems, and the ratios of the first to the best of the others."""
    processes, figures = {}, {}
    for name in SYSTEMS:  # each loads alone
        processes[name] = _Process(name, file, threads)
        figures[name] = processes[name].ask("loaded")
    measures: dict[str, Figures] = {
        name: partial(process.ask, "measure") for name, process in processes.items()
    }
    if program is not None:
        figures["llama-bench"] = {}
        measures["llama-bench"] = partial(_llama_bench, program, file, threads)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for i in range(rounds + 1):
        for name, measure in measures.items():
            figure = measure()
            if i:  # the first round warms up
                runs[name].append(figure)
    for name, values in runs.items():
        figures[name] |= {key: statistics.median(run[key] for run in values) for key in values[0]}
    for name, process in processes.items():
        figures[name] |= process.ask("end")
    ours, *others = figures.values()
    ratios = {}
    for key, value in ours.items():
        theirs = [other[key] for other in others if key in other]
        if theirs:
            best = max(theirs) if key.endswith("tokens/s") else min(theirs)
            ratios[f"{key}, ratio"] = value / best
    return {"bytes": file.stat().st_size, **figures, **ratios}


def _llama_bench(program: str, file: Path, threads: int) -> dict[str, float]:
    prompt, new = (f"{PROMPT_TOKENS}", f"{NEW_TOKENS}")
    results = llama_bench(program, file, threads, "-p", prompt, "-n", new, "-r", "1")
    return {
        "prefill tokens/s" if one["n_prompt"] else "decode tokens/s": one["avg_ts"]
        for one in results
    }


class _Process:
    def __init__(self, system: str, file: Path, threads: int) -> None:
        command = [
            sys.executable,
            __file__,
            str(file),
            "--serve",
            system,
            "--threads",
            str(threads),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(question, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise ValueError("a process has ended; its message is above")


def serve(system: str, file: Path, threads: int) -> None:
    """Answer the questions of `compare` about one system, in this process."""
    native.prepare()  # compiling is not loading
    before = time.perf_counter()
    measure, last = (_layerskip if system == "layerskip" else _llama_cpp)(file, threads)
    loaded = time.perf_counter() - before
    for line in sys.stdin:
        if line.strip() == "loaded":
            answer = {"load s": loaded}
        elif line.strip() == "measure":
            answer = measure()
        else:
            answer = last() | {"resident bytes": _resident()}
        print(json.dumps(answer), flush=True)
        if line.strip() == "end":
            return


Figures = Callable[[], dict[str, float]]


def _layerskip(file: Path, threads: int) -> tuple[Figures, Figures]:
    model = LayerSkipModel.from_pretrained(file)
    decoder = model.decoder
    prompt = torch.randint(1000, (1, PROMPT_TOKENS), generator=torch.manual_seed(0))

    def measure() -> dict[str, float]:
        cache = decoder.new_cache(PROMPT_TOKENS + NEW_TOKENS)
        start = time.perf_counter()
        hidden = decoder.run(decoder.embed(prompt), 0, len(decoder.layers), cache)
        token = decoder.greedy_tokens(hidden[:, -1:])
        cache.lengths += PROMPT_TOKENS
        middle = time.perf_counter()
        # Behind a prompt of the usual length, as llama.cpp's tokens are.
        cache.lengths.fill_(16)
        for _ in range(NEW_TOKENS):
            _, token, _ = decoder.greedy_step(token, len(decoder.layers), cache)
            cache.lengths += 1
        end = time.perf_counter()
        return {
            "prefill tokens/s": PROMPT_TOKENS / (middle - start),
            "decode tokens/s": NEW_TOKENS / (end - middle),
        }

    def last() -> dict[str, float]:
        cache = decoder.new_cache(256)
        passes = {n: (lambda n=n: ms_of(verify, decoder, cache, n)) for n in (1, 5)}
        ms = interleaved(passes, 15)
        return {"five rows / one": ms[5] / ms[1], "bytes of a step": decoder.weight_bytes}

    return torch.inference_mode()(measure), last


def _llama_cpp(file: Path, threads: int) -> tuple[Figures, Figures]:
    job = Job(
        model=str(file),
        tokenizer=None,
        gguf=str(file),
        dtype="bfloat16",
        device="cpu",
        threads=threads,
        context=PROMPT_TOKENS + NEW_TOKENS + 16,
        eos_token_ids=(),
        stop=(),
    )
    server = llama_cpp._start(job, Setting())
    prompt = torch.randint(1000, (PROMPT_TOKENS,), generator=torch.manual_seed(0)).tolist()

    def timings(n_prompt: int, n_new: int) -> dict[str, float]:
        request = {"prompt": prompt[:n_prompt], "n_predict": n_new, "ignore_eos": True}
        request |= {"samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
        answer: dict[str, float] = json.loads(llama_cpp._post(server, request))["timings"]
        return answer

    def measure() -> dict[str, float]:
        return {
            "prefill tokens/s": timings(PROMPT_TOKENS, 1)["prompt_per_second"],
            "decode tokens/s": timings(16, NEW_TOKENS)["predicted_per_second"],
        }

    return measure, dict


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


# --- a Q4_K_M file


def make_q4_k_m(source: Path, target: Path) -> None:
    """Quantize a GGUF file of a Llama with a tied head by llama.cpp's rules for Q4_K_M."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    file = GgufFile(source)
    writer = gguf.GGUFWriter(str(target), str(file.field("general.architecture")))
    for key, value, types in file.fields():
        if key not in ("general.architecture", "general.file_type") and value != []:
            is_array = types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, value, types[0], types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    n_layers = int(file.field(f"{writer.arch}.block_count"))
    for tensor in gguf.GGUFReader(source).tensors:
        name, shape = tensor.name, tuple(reversed(tensor.shape.tolist()))
        kind = _kind_in_q4_k_m(name, shape, n_layers)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
        if kind == Kind.F32:
            writer.add_tensor(name, values)
            continue
        data = np.empty(gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)
        quantize(int(kind), values.ctypes.data, data.ctypes.data, 0, *values.shape, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NARROW = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}  # rows that are no multiple of 256


def _kind_in_q4_k_m(name: str, shape: tuple[int, ...], n: int) -> Kind:
    if len(shape) == 1:
        return Kind.F32
    layer = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)", name)
    i = int(layer[1]) if layer else -1
    has_more_bits = layer and (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2)
    kind = Kind.Q6_K if has_more_bits or name == "token_embd.weight" else Kind.Q4_K
    return kind if shape[-1] % 256 == 0 else _NARROW[kind]


if __name__ == "__main__":
    run(main)
