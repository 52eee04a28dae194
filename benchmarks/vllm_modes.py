"""Speed, memory and exactness of method "layerskip" inside vLLM, beside vLLM's other ways to decode.

    layerskip export --model smollm2-135m-topv2 --to hf runs/vllm/target
    layerskip export --model smollm2-135m-topv2 --to hf-draft --exit-layer 4 runs/vllm/draft
    LAYERSKIP_DATA=data python benchmarks/vllm_modes.py --model runs/vllm/target \\
        --draft runs/vllm/draft --output benchmarks/results/vllm-NAME.json

Python is that of an environment with vLLM (`make test-vllm` makes one). Each mode runs in a process of
its own, with the engine in that process, so that its CPU time and memory are the mode's; its rows are
written as soon as it ends. With `--busy` there are no wall-clock figures: on a machine with other work
only those per CPU second hold. `identical_to_plain` compares greedy token ids at the same batch size: in
float32 all have to be the same, in bfloat16 ties may fall differently.
"""

import argparse
import csv
import itertools
import json
import lzma
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODES = ("plain", "layerskip", "layerskip_by_batch", "draft_model", "ngram")
MAX_MODEL_LEN = 1024
MAX_PROMPT_CHARACTERS = 2_000


def main() -> None:
    options = _options()
    if options.rows_to:
        _measure(options)
        return
    result: dict[str, Any] = {"environment": _environment(options), "rows": []}
    plain: dict[int, list[list[int]]] = {}
    for mode in options.modes:
        for row in _in_a_process(mode):
            if options.busy:
                del row["seconds"], row["tokens_per_s"]
            ids = row.pop("token_ids")
            reference = (
                plain.setdefault(row["batch"], ids) if mode == "plain" else plain.get(row["batch"])
            )
            if reference is not None and mode != "plain":
                row["identical_to_plain"] = sum(map(list.__eq__, reference, ids))
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with an exit layer")
    parser.add_argument("--draft", type=Path, help="its draft checkpoint, for mode draft_model")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--batches", type=_integers, default=[1, 4, 8, 16])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument(
        "--by-batch",
        type=json.loads,
        default=[[1, 2, 4], [3, 16, 2]],
        help="num_speculative_tokens_per_batch_size of mode layerskip_by_batch",
    )
    parser.add_argument("--draft-vocab-size", type=int, help="of layerskip")
    parser.add_argument("--topv2", type=int, default=100, metavar="N", help="prompts of TOPv2")
    parser.add_argument(
        "--spec-bench", type=int, default=0, metavar="N", help="prompts of Spec-Bench"
    )
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--busy", action="store_true", help="note that other programs ran meanwhile"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "draft_model" in options.modes and options.draft is None:
        parser.error("mode draft_model needs --draft")
    if "LAYERSKIP_DATA" not in os.environ:
        parser.error("set LAYERSKIP_DATA to the folder of topv2 and spec_bench")
    return options


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _in_a_process(mode: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, *sys.argv, "--modes", mode, "--rows-to", str(file)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def _measure(options: argparse.Namespace) -> None:
    os.environ |= {
        "MKL_NUM_THREADS": str(options.threads),  # PyTorch takes the smaller one of the two
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    (mode,) = options.modes
    speculative_config = _speculative_config(mode, options)
    engine = LLM(
        str(options.model),
        dtype=options.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(options.batches),
        enforce_eager=options.eager,
        disable_log_stats=False,
        generation_config="vllm",
        seed=0,
        speculative_config=speculative_config,
    )
    prompts = _prompts(options, engine.get_tokenizer())
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    engine.generate(prompts[:2], sampling, use_tqdm=False)
    cache = engine.llm_engine.vllm_config.cache_config
    rows = []
    for batch in options.batches:
        engine.reset_prefix_cache()
        before, start, cpu_start = _counters(engine), time.perf_counter(), time.process_time()
        outputs = []
        for first in range(0, len(prompts), batch):
            outputs += engine.generate(prompts[first : first + batch], sampling, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        steps, drafted, accepted = (
            after - earlier for earlier, after in zip(before, _counters(engine), strict=True)
        )
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        tokens = sum(map(len, token_ids))
        rows.append(
            {
                "mode": mode.removesuffix("_by_batch"),
                "batch": batch,
                "draft_tokens": _draft_tokens(speculative_config),
                "prompts": len(prompts),
                "tokens": tokens,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "tokens_per_s": round(tokens / seconds, 2),
                "tokens_per_cpu_s": round(tokens / cpu_seconds, 2),
                "acceptance": round(accepted / drafted, 4) if drafted else None,
                "tokens_per_verification": round(1 + accepted / steps, 3) if steps else None,
                "rss_mb": _resident_mb(),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
                "token_ids": token_ids,
            }
        )
        options.rows_to.write_text(json.dumps(rows))


def _speculative_config(mode: str, options: argparse.Namespace) -> dict[str, Any] | None:
    drafts = {"num_speculative_tokens": options.draft_tokens}
    layerskip = {"method": "layerskip"} | drafts
    if options.draft_vocab_size is not None:
        layerskip["draft_vocab_size"] = options.draft_vocab_size
    return {
        "plain": None,
        "layerskip": layerskip,
        "layerskip_by_batch": layerskip
        | {"num_speculative_tokens_per_batch_size": options.by_batch},
        "draft_model": {"method": "draft_model", "model": str(options.draft)} | drafts,
        "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4} | drafts,
    }[mode]


def _draft_tokens(speculative_config: dict[str, Any] | None) -> Any:
    """Return the number of draft tokens, or the table of them by batch size."""
    drafts = speculative_config or {}
    return drafts.get("num_speculative_tokens_per_batch_size", drafts.get("num_speculative_tokens"))


def _counters(engine: Any) -> tuple[int, ...]:
    """Verifications of drafts, drafted and accepted tokens since the engine started."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return tuple(values.get(f"vllm:spec_decode_num_{name}", 0) for name in names)


def _prompts(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    data = Path(os.environ["LAYERSKIP_DATA"])
    prompts = []
    files = sorted((data / "topv2").glob("*_eval.tsv.xz"))
    share = -(-options.topv2 // len(files)) if files else 0
    for file in files:
        rows = csv.DictReader(_read(file).splitlines(), delimiter="\t")
        prompts += [row["utterance"] + "\n" for row in itertools.islice(rows, share)]
    prompts = prompts[: options.topv2]
    if options.spec_bench:
        lines = _read(data / "spec_bench" / "question.jsonl.xz").splitlines()
        turns = [json.loads(line)["turns"][0] for line in lines]
        turns = [turn for turn in turns if len(turn) <= MAX_PROMPT_CHARACTERS]
        for turn in _spread(turns, options.spec_bench):
            message = {"role": "user", "content": turn}
            prompts.append(
                tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            )
    return prompts


def _read(file: Path) -> str:
    with lzma.open(file, "rt", encoding="utf-8") as stream:
        return stream.read()


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[index * len(items) // count] for index in range(count)]


def _resident_mb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import vllm

    from layerskip.model.hardware import cpu_flags, cpu_model, cpu_name

    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "command": shlex.join(["python", "benchmarks/vllm_modes.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpu_model": cpu_model(),
        "cpu_flags": cpu_flags(),
        "threads": options.threads,
        "dtype": options.dtype,
        "compiled": not options.eager,
        "machine_busy": options.busy,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
