"""Measure the time saved by reusing the KV cache of the draft (KVQ, section 4.3).

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.kvq \\
        --model smollm2-135m-topv2 --task topv2 --samples 16 --exits 4,6,8 --draft-tokens 4,8 \\
        --repeats 3

The same rounds on the same checkpoint and prompts, interleaved, with two kinds of verification:

- with reuse: the hidden states, keys and values of the draft are kept, and verification runs layers
  [E, L). The last drafted token passes the first E layers alone.
- without: verification runs all L layers over all positions in one pass and writes the keys and values
  of the first E layers again.

Both must return the tokens of plain decoding. Greedy, batch size 1; the prefill is not timed.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import run
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.model import Decoder
from layerskip.model.step_timing import device_clock
from paper.checkpoints import TINY, new_model, shown, told, version, write_rows
from paper.corpus import STANDARD_LIBRARY, Corpus, functions
from paper.record import Record, numbers, options_of

SMOKE = {"samples": 2, "exits": [1, 3], "draft_tokens": [3], "max_new_tokens": 8, "repeats": 1}
KINDS = WITH, WITHOUT = "with", "without"


def main() -> None:
    options = _options()
    record = Record("kvq", options)
    if options.smoke:
        corpus = Corpus.of([STANDARD_LIBRARY], 200_000)
        new_model(Path(options.model), corpus.train, 300, TINY, weights=True)
        write_rows(Path(options.task), functions(corpus.held_out))
    model = LayerSkipModel.from_pretrained(options.model, dtype=options.dtype)
    task = load_task(options.task, samples=options.samples, judged=False)
    room = model.decoder.architecture.max_context - options.max_new_tokens - 1
    prompts = [
        ids for sample in task.samples if 0 < len(ids := model.tokenize(sample.prompt)) < room
    ]
    for exit_layer in options.exits:
        for draft_tokens in options.draft_tokens:
            variant = f"E = {exit_layer}, d = {draft_tokens}"
            if record.lacks(variant):
                row = compared(
                    model,
                    prompts,
                    exit_layer,
                    draft_tokens,
                    options.max_new_tokens,
                    options.repeats,
                )
                folder = Path(options.model)
                row |= {"model": shown(folder), "trained": told(folder), "task": options.task}
                row |= {"version": version(options.model)}
                record.add(variant, row, model.decoder.kernels)


def _options() -> argparse.Namespace:
    parser = options_of("kvq", "Time saved by reuse of the KV cache.", argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m", help="a trained checkpoint")
    parser.add_argument("--task", default="topv2", help="as for `layerskip bench`")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--exits", type=numbers, default=[4, 8, 15])
    parser.add_argument("--draft-tokens", type=numbers, default=[4, 8])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        base, task = options.work / "base", options.work / "prompts.jsonl"
        vars(options).update(SMOKE, model=str(base), task=str(task), dtype="float32")
    return options


@torch.inference_mode()
def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    exit_layer: int,
    draft_tokens: int,
    new_tokens: int,
    *,
    reuse: bool,
) -> tuple[list[int], float]:
    """Decode greedily in rounds; return the new tokens and the seconds after the first of them."""
    clock = device_clock(decoder.device)
    num_layers = len(decoder.layers)
    cache = decoder.new_cache(len(prompt) + new_tokens)

    def run_layers(hidden: Tensor, start: int, stop: int, position: int) -> Tensor:
        cache.lengths.fill_(position)
        return decoder.run(hidden, start, stop, cache)

    ids = torch.tensor([list(prompt)], device=decoder.device)
    hidden = run_layers(decoder.embed(ids), 0, num_layers, 0)
    last = decoder.logits(hidden[:, -1:]).argmax(dim=-1)
    tokens, position = [int(last)], len(prompt)
    begin = clock()
    while len(tokens) < new_tokens:
        # 1. Draft
        draft, states = [last], []
        for i in range(min(draft_tokens, new_tokens - len(tokens) - 1)):
            states.append(run_layers(decoder.embed(draft[-1]), 0, exit_layer, position + i))
            draft.append(decoder.logits(states[-1]).argmax(dim=-1))
        # 2. Verify
        if reuse:
            embedded = decoder.embed(draft[-1])
            states.append(run_layers(embedded, 0, exit_layer, position + len(states)))
            hidden = run_layers(torch.cat(states, dim=1), exit_layer, num_layers, position)
        else:
            hidden = run_layers(decoder.embed(torch.cat(draft, dim=1)), 0, num_layers, position)
        # 3. Accept
        target = decoder.logits(hidden).argmax(dim=-1)[0].tolist()
        drafted = torch.cat(draft, dim=1)[0, 1:].tolist()
        equal = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(drafted, target, strict=False)
        )
        accepted = len(list(equal))
        tokens += target[: accepted + 1]
        # 4. Roll back the cache
        position += accepted + 1
        last = torch.tensor([[tokens[-1]]], device=decoder.device)
    return tokens, clock() - begin


def compared(
    model: LayerSkipModel,
    prompts: Sequence[Sequence[int]],
    exit_layer: int,
    draft_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure both kinds of verification, interleaved, over all prompts."""
    decoder = model.decoder

    def timed(kind: str, ids: Sequence[int], n: int) -> tuple[list[int], float]:
        return decode(decoder, ids, exit_layer, draft_tokens, n, reuse=kind == WITH)

    plain = [
        model.generate(ids, mode="plain", max_new_tokens=new_tokens, ignore_eos=True).token_ids
        for ids in prompts
    ]
    same = dict.fromkeys(KINDS, 0)
    ms: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:  # warm-up
        timed(kind, prompts[0], min(new_tokens, 16))
    for repeat in range(repeats):
        seconds = dict.fromkeys(KINDS, 0.0)
        for i, (ids, expected) in enumerate(zip(prompts, plain, strict=True)):
            for kind in KINDS[:: 1 if (repeat + i) % 2 else -1]:
                tokens, elapsed = timed(kind, ids, new_tokens)
                seconds[kind] += elapsed
                same[kind] += tokens == expected
        for kind, elapsed in seconds.items():
            ms[kind].append(1e3 * elapsed / (len(prompts) * (new_tokens - 1)))
    medians = {name: statistics.median(values) for name, values in ms.items()}
    return {
        "exit_layer": exit_layer,
        "draft_tokens": draft_tokens,
        "samples": len(prompts),
        "new_tokens": new_tokens,
        "ms_per_token": medians,
        "ms_per_token_of_repeats": ms,
        "identical_to_plain": {n: same[n] / (len(prompts) * repeats) for n in KINDS},
    }


if __name__ == "__main__":
    run(main)
