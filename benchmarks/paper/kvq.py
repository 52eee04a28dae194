"""One cache for draft and verification (KVQ): what reusing the first E layers saves.

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.kvq \\
        --model smollm2-135m-layerskip --task topv2 --samples 16 --exits 4,6,8 --draft-tokens 4,8 \\
        --repeats 3

The same rounds on the same checkpoint and prompts, in turns, with verification done in two ways:

- with reuse, as everywhere in this package: the draft's hidden states and its keys and values stay, and
  verification runs layers [E, L). The last drafted token, which drafting has no need of, runs through
  the first E layers on its own.
- without: the draft is forgotten, and verification runs all L layers over all positions in one pass,
  writing the first E layers' keys and values again. The last drafted token is not run on its own here.

Both have to give the tokens of plain decoding. Greedy, one prompt at a time; the prompt's pass is not
counted.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import run
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding import Sampling
from layerskip.decoding.accept import accept_greedy
from layerskip.decoding.drafters import Draft, EarlyExitDrafter
from layerskip.decoding.sampling import next_token
from layerskip.model import Decoder, KVCache
from layerskip.model.step_timing import device_clock
from paper.checkpoints import TINY, new_model, shown, told, version, write_rows
from paper.corpus import STANDARD_LIBRARY, Corpus, functions
from paper.record import Record, numbers, options_of

GREEDY = Sampling()
SMOKE = {"samples": 2, "exits": [1, 3], "draft_tokens": [3], "max_new_tokens": 8, "repeats": 1}
WITH, WITHOUT = "with", "without"


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
    parser = options_of("kvq", "What reuse of the cache saves.", argparse.SUPPRESS)
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


class RecomputingDrafter(EarlyExitDrafter):
    """Drafts the same tokens, and leaves nothing for verification to start from."""

    def draft(
        self, last: Tensor, n: int, cache: KVCache, history: Any, generator: Any
    ) -> Draft | None:
        """See `EarlyExitDrafter`, whose own extra pass over the last token gives the last draft here."""
        if n == 0:
            return None
        if n == 1:
            state = self.decoder.run(self.decoder.embed(last), 0, self.exit_layer, cache)
            drafted = last[:, :0]
        else:
            shorter = super().draft(last, n - 1, cache, history, generator)
            assert shorter is not None
            state, drafted = shorter.states[:, -1:], shorter.tokens
        chosen = next_token(self.decoder, state, self.sampling, generator)
        tokens = torch.cat([drafted, chosen], dim=1)
        states = self.decoder.embed(torch.cat([last, tokens], dim=1))
        return Draft(tokens, None, states, start=0, source=self.source)


DRAFTERS = {WITH: EarlyExitDrafter, WITHOUT: RecomputingDrafter}


@torch.inference_mode()
def answer(
    decoder: Decoder,
    drafter: EarlyExitDrafter,
    prompt: Sequence[int],
    draft_tokens: int,
    new_tokens: int,
) -> tuple[list[int], float]:
    """The rounds of section 4.3, written out: the new tokens, and seconds after the first of them."""
    clock = device_clock(decoder.device)
    layers = len(decoder.layers)
    cache = decoder.new_cache(len(prompt) + new_tokens)
    ids = torch.tensor([list(prompt)], device=decoder.device)
    hidden = decoder.run(decoder.embed(ids), 0, layers, cache)
    cache.lengths += ids.shape[1]
    last = decoder.logits(hidden[:, -1:]).argmax(dim=-1)
    tokens = [int(last)]
    begin = clock()
    while len(tokens) < new_tokens:
        n = min(draft_tokens, new_tokens - len(tokens) - 1)
        draft = drafter.draft(last, n, cache, None, None)
        drafted = last[:, :0] if draft is None else draft.tokens
        states, start = (decoder.embed(last), 0) if draft is None else (draft.states, draft.start)
        hidden = decoder.run(states, start, layers, cache)
        accepted, following = accept_greedy(drafted, decoder.choose(hidden))
        last = following[:, None]
        count = int(accepted)
        tokens += [*drafted[0, :count].tolist(), int(last)]
        cache.lengths += count + 1
    return tokens, clock() - begin


def compared(
    model: LayerSkipModel,
    prompts: Sequence[Sequence[int]],
    exit_layer: int,
    draft_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Both ways on all prompts, in turns; figures are over the repetitions' sums."""
    decoder = model.decoder
    drafters = {name: kind(decoder, exit_layer, GREEDY) for name, kind in DRAFTERS.items()}
    wanted = [
        model.generate(ids, mode="plain", max_new_tokens=new_tokens, ignore_eos=True).token_ids
        for ids in prompts
    ]
    same = dict.fromkeys(drafters, 0)
    ms: dict[str, list[float]] = {name: [] for name in drafters}
    for drafter in drafters.values():  # warm-up
        answer(decoder, drafter, prompts[0], draft_tokens, min(new_tokens, 16))
    for turn in range(repeats):
        seconds = dict.fromkeys(drafters, 0.0)
        for at, (ids, plain) in enumerate(zip(prompts, wanted, strict=True)):
            order = list(drafters)[:: 1 if (turn + at) % 2 else -1]
            for name in order:
                made, took = answer(decoder, drafters[name], ids, draft_tokens, new_tokens)
                seconds[name] += took
                same[name] += made == plain
        for name, took in seconds.items():
            ms[name].append(1e3 * took / (len(prompts) * (new_tokens - 1)))
    medians = {name: statistics.median(values) for name, values in ms.items()}
    return {
        "exit_layer": exit_layer,
        "draft_tokens": draft_tokens,
        "samples": len(prompts),
        "new_tokens": new_tokens,
        "ms_per_token": medians,
        "ms_per_token_of_repeats": ms,
        "identical_to_plain": {n: same[n] / (len(prompts) * repeats) for n in drafters},
    }


if __name__ == "__main__":
    run(main)
