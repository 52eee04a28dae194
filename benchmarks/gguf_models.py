"""Published GGUF files against llama.cpp and transformers on the same file.

    python benchmarks/gguf_models.py gemma3-270m.gguf qwen2.5-coder-0.5b.gguf --output FILE

Greedy tokens are compared at every position of llama.cpp's answers, ours in float32: a margin is how
much our best logit exceeds that of its token, 0 where both choose the same. llama.cpp rounds activations
to 8 bits in products with quantized weights, so near-ties may fall either way. The mean negative
log-likelihood of a text is compared with transformers' float32 loading of the file.
"""

import argparse
import gc
import json
import urllib.request
from pathlib import Path
from typing import Any

import common
import torch

from layerskip import LayerSkipModel

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
NEW_TOKENS = 16
NLL_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--text", type=Path, default=common.ROOT / "docs" / "recipe.md")
    options = common.parse(parser)
    rows = [
        row(file, options.text.read_text(encoding="utf-8"), options.threads)
        for file in options.files
    ]
    result = {
        "environment": common.environment("benchmarks/gguf_models.py", "float32"),
        "rows": rows,
    }
    common.deliver(result, options.output)


def row(file: Path, text: str, threads: int) -> dict[str, Any]:
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
    greedy = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True, "n_predict": NEW_TOKENS}
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
    common.run(main)
