"""The step loop for many prompts at once: every row has its own length, and leaves when it ends."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from layerskip.decoding.draft_costs import ContextCosts
from layerskip.decoding.draft_length import BatchLength
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.decoding.generate import (
    PREFILL_CHUNK,
    check_numbers,
    outside_autocast,
    plain_step,
    speculate,
)
from layerskip.decoding.policy import Plan
from layerskip.decoding.prefix import same_rope_scaling
from layerskip.decoding.prompt import check_prompt
from layerskip.decoding.sampling import Sampling, next_token, seeded_generator
from layerskip.decoding.short_head import ReducedHead
from layerskip.decoding.step import Ending, Step
from layerskip.model import Decoder

MOST_ROWS = 64  # of a batch: what a list of any length takes no more memory than
# Positions of padding that a batch may have even where that is above half of it: running them takes
# about as long as a second batch.
_PADDING = 8 * PREFILL_CHUNK


class Batch:
    """Prompts that are continued together, in one cache with a row each.

    Drafts come from the early exit, of one length for all rows, which adaptive ones choose anew in every
    round; each row keeps what the model agreed with there. A draft vocabulary has the tokens of all
    prompts.

    Args:
        decoder: the model.
        prompts: token ids, of any lengths.
        plan: the same for all.
        sampling: the same for all, without a repetition penalty.
        max_new_tokens: 1 or more.
        end_tokens: what ends a row.
        seed: of the whole batch.

    Raises:
        PromptError: a prompt that cannot be continued.
        ValueError: a plan or sampling that is for one prompt only.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        plan: Plan,
        sampling: Sampling,
        max_new_tokens: int,
        end_tokens: Collection[int] = (),
        seed: int | None = None,
    ) -> None:
        if not can_batch(plan, sampling):
            raise ValueError("a batch has no repetition penalty and no drafts from n-grams")
        for prompt in prompts:
            check_prompt(decoder, prompt)
        self._decoder, self._prompts, self._plan, self._sampling = decoder, prompts, plan, sampling
        self._endings = [
            Ending.of(decoder, prompt, max_new_tokens, end_tokens) for prompt in prompts
        ]
        self._rows = list(range(len(prompts)))  # prompts that are still being continued
        capacity = max(ending.capacity for ending in self._endings)
        self._cache = decoder.new_cache(capacity, len(prompts))
        self._generator = seeded_generator(decoder.device, seed)
        self._drafter: EarlyExitDrafter | None = None
        self._length: BatchLength | None = None
        if plan.mode == "self-speculative":
            assert plan.exit_layer is not None
            seen = {token for prompt in prompts for token in prompt}
            head = ReducedHead.of(decoder, plan.draft_vocabulary, seen)
            self._drafter = EarlyExitDrafter(decoder, plan.exit_layer, sampling, head)
            if plan.adaptive:
                assert plan.draft_tokens is not None
                self._costs = ContextCosts(decoder, plan.exit_layer, head, plan.costs)
                costs = self._costs.over([len(prompt) for prompt in prompts])
                self._length = BatchLength(costs, plan.draft_tokens)

    def leave(self, prompt: int) -> None:
        """End a prompt's answer, as at a stop string."""
        self._endings[prompt].reached = True

    @torch.inference_mode()
    def steps(self) -> Iterator[tuple[int, Step]]:
        """Yield which prompt, and its next step, until all have ended."""
        for steps in outside_autocast(self._decoder.device, self._rounds()):
            for prompt, step in zip(self._rows, steps, strict=True):
                if not self._endings[prompt].reached:
                    yield prompt, self._endings[prompt].cut(step)

    def _rounds(self) -> Iterator[list[Step]]:
        """The next step of every row; those that have ended meanwhile leave before the next round."""
        n_layers = self._plan.final_exit(len(self._decoder.layers))
        last = self._prefill(n_layers)
        steps = [Step((token,)) for token in last[:, 0].tolist()]
        while True:
            yield steps
            last = self._drop_ended(last)
            if not self._rows:
                return
            if self._drafter is not None:
                steps, last = self._round(self._drafter, last)
            else:
                how = (self._cache, self._sampling, self._generator)
                last = plain_step(self._decoder, last, n_layers, *how)
                steps = [Step((token,)) for token in last[:, 0].tolist()]

    def _round(self, drafter: EarlyExitDrafter, last: Tensor) -> tuple[list[Step], Tensor]:
        """Draft, verify, and keep what each row agrees with, as for one prompt."""
        assert self._plan.draft_tokens is not None
        length = self._length
        if length is not None and (now := self._costs.grown(self._cache.lengths.tolist())):
            length.costs = now
        n = self._plan.draft_tokens if length is None else length.choose(len(self._rows))
        n = min(n, min(self._endings[prompt].room for prompt in self._rows) - 1)
        following, steps = speculate(
            self._decoder, drafter, last, n, self._cache, self._sampling, self._generator
        )
        if length is not None and n:
            length.learn(n, [step.accepted for step in steps])
        return steps, following

    def _prefill(self, n_layers: int) -> Tensor:
        """Run the padded prompts through the first n layers and choose what follows each, [B, 1].

        Padding is on the right, where no token of the prompt sees it, and is written over later.
        """
        decoder = self._decoder
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device="cpu")
        width = int(lengths.max())
        padded = torch.tensor(
            [[*prompt, *[0] * (width - len(prompt))] for prompt in self._prompts],
            device=decoder.device,
        )
        ends: dict[int, Tensor] = {}
        positions = max(1, PREFILL_CHUNK // len(self._prompts))  # of each
        for start in range(0, width, positions):
            chunk = padded[:, start : start + positions]
            hidden = decoder.run(decoder.embed(chunk), 0, n_layers, self._cache)
            self._cache.lengths += chunk.shape[1]
            for row, end in enumerate((lengths - 1 - start).tolist()):
                if 0 <= end < chunk.shape[1]:
                    ends[row] = hidden[row, end : end + 1]
        self._cache.lengths.copy_(lengths)
        hidden = torch.stack([ends[row] for row in range(len(ends))])
        check_numbers(hidden)
        return next_token(decoder, hidden, self._sampling, self._generator)

    def _drop_ended(self, last: Tensor) -> Tensor:
        """Take the rows of ended prompts out of the cache and out of `last`."""
        going = [i for i, prompt in enumerate(self._rows) if not self._endings[prompt].reached]
        if len(going) == len(self._rows):
            return last
        self._rows = [self._rows[i] for i in going]
        index = torch.tensor(going, dtype=torch.long, device="cpu")
        self._cache.keep_rows(index)
        return last[index.to(last.device)]


def can_batch(plan: Plan, sampling: Sampling) -> bool:
    """Whether prompts can be continued together: what looks at one text alone cannot."""
    return plan.draft_from == "early-exit" and sampling.repetition_penalty == 1.0


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Which prompts of these lengths are continued together, the longest first.

    They are `MOST_ROWS` at most, and none of a length that would be little but padding. Those of a
    group stay in their order.
    """
    groups = list[list[int]]()
    width = total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total += lengths[i]
        padding = width * (len(groups[-1]) + 1) - total if groups else 0
        if not groups or len(groups[-1]) == MOST_ROWS or padding > max(total, _PADDING):
            groups.append([])
            width = total = lengths[i]
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def alike(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Whether all together turn as each would alone: LongRoPE has factors for two lengths."""
    sizes = [Ending.of(decoder, prompt, max_new_tokens).capacity for prompt in prompts]
    return same_rope_scaling(decoder, *sizes)
