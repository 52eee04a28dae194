"""The decoding loop for many prompts at once: every row has its own length, and leaves when it ends."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from layerskip.decoding.config import DecodingConfig
from layerskip.decoding.controller import (
    EXIT_ACCEPTANCE,
    BatchController,
    ContextCosts,
    Controller,
    DraftCosts,
    FixedController,
)
from layerskip.decoding.drafters import Draft, EarlyExit, ReducedHead
from layerskip.decoding.generate import (
    PREFILL_CHUNK,
    Step,
    StoppingCriteria,
    check_finite,
    outside_autocast,
    plain_step,
    speculate,
)
from layerskip.decoding.prefix_cache import same_rope_scaling
from layerskip.decoding.prompt import check_prompt
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder, StepCosts

MAX_ROWS = 64  # of a batch, which bounds its memory
# Positions of padding that a batch may have even where that is more than half of it: running them takes
# about as long as a second batch.
_PADDING = 8 * PREFILL_CHUNK


class Batch:
    """Prompts that are continued together, in one cache with a row each.

    Drafts come from the early exit, of one length for all rows, which an adaptive controller chooses
    anew in every round; each row keeps what the model agrees with there. A draft vocabulary has the
    tokens of all prompts.

    Args:
        decoder: the model.
        prompts: token ids, of any lengths.
        config: resolved, the same for all; its seed is that of the whole batch.
        eos_token_ids: tokens that end a row.
        measured: see `generate`.

    Raises:
        PromptError: a prompt that cannot be continued.
        ValueError: a config that is for one prompt only.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        eos_token_ids: Collection[int] = (),
        measured: StepCosts | None = None,
    ) -> None:
        if not can_batch(config):
            raise ValueError("a batch has no repetition penalty and no drafts from n-grams")
        for prompt in prompts:
            check_prompt(decoder, prompt)
        self._decoder, self._prompts, self._config = decoder, prompts, config
        self._criteria = [
            StoppingCriteria.of(decoder, prompt, config.max_new_tokens, eos_token_ids)
            for prompt in prompts
        ]
        self._rows = list(range(len(prompts)))  # prompts that are still being continued
        capacity = max(criteria.capacity for criteria in self._criteria)
        self._cache = decoder.new_cache(capacity, len(prompts))
        self._sampler = Sampler(config, decoder.device, config.seed)
        self._controller: Controller | None = None
        if config.mode == "self-speculative":
            assert config.exit_layer is not None
            assert not isinstance(config.draft_vocabulary, int)
            seen = {token for prompt in prompts for token in prompt}
            head = ReducedHead.of(decoder, config.draft_vocabulary, seen)
            drafter = EarlyExit(decoder, config.exit_layer, self._sampler, head)
            costs = ContextCosts(decoder, config.exit_layer, drafter.head_share, measured)
            self._controller = (
                BatchController(drafter, costs) if config.adaptive else FixedController([drafter])
            )

    def leave(self, prompt: int) -> None:
        """End a prompt's answer, as at a stop string."""
        self._criteria[prompt].finished = True

    @torch.inference_mode()
    def steps(self) -> Iterator[tuple[int, Step]]:
        """Yield the index of a prompt and its next step, until all have ended."""
        for steps in outside_autocast(self._decoder.device, self._rounds()):
            for prompt, step in zip(self._rows, steps, strict=True):
                if not self._criteria[prompt].finished:
                    yield prompt, self._criteria[prompt].truncate(step)

    def _rounds(self) -> Iterator[list[Step]]:
        """Yield the next step of every row; rows that have ended leave before the next round."""
        n_layers = self._config.num_layers_to_run(len(self._decoder.layers))
        last = self._prefill(n_layers)
        steps = [Step((token,)) for token in last[:, 0].tolist()]
        while True:
            yield steps
            last = self._drop_finished(last)
            if not self._rows:
                return
            if self._controller is None:
                last = plain_step(self._decoder, last, n_layers, self._cache, self._sampler)
                steps = [Step((token,)) for token in last[:, 0].tolist()]
            else:
                last, steps = self._round(self._controller, last)

    def _round(self, controller: Controller, last: Tensor) -> tuple[Tensor, list[Step]]:
        """Draft, verify, and keep what each row agrees with, as for one prompt."""
        config = self._config
        assert config.draft_tokens is not None
        remaining = min(self._criteria[prompt].remaining for prompt in self._rows)
        n = min(config.draft_tokens, remaining - 1)
        draft = Draft(last, self._cache)
        return speculate(self._decoder, controller, draft, n, self._sampler, config.exit_layer)

    def _prefill(self, n_layers: int) -> Tensor:
        """Run the padded prompts through layers [0, n_layers) and choose the next tokens, [B, 1].

        Padding is on the right, where no token of the prompt sees it, and is overwritten later.
        """
        decoder = self._decoder
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device="cpu")
        width = int(lengths.max())
        padded = torch.tensor(
            [[*prompt, *[0] * (width - len(prompt))] for prompt in self._prompts],
            device=decoder.device,
        )
        last_states: dict[int, Tensor] = {}
        positions = max(1, PREFILL_CHUNK // len(self._prompts))  # of each prompt
        for start in range(0, width, positions):
            chunk = padded[:, start : start + positions]
            hidden = decoder.run(decoder.embed(chunk), 0, n_layers, self._cache)
            self._cache.lengths += chunk.shape[1]
            for row, end in enumerate((lengths - 1 - start).tolist()):
                if 0 <= end < chunk.shape[1]:
                    last_states[row] = hidden[row, end : end + 1]
        self._cache.lengths.copy_(lengths)
        hidden = torch.stack([last_states[row] for row in range(len(last_states))])
        check_finite(hidden)
        return self._sampler.next_tokens(decoder, hidden)

    def _drop_finished(self, last: Tensor) -> Tensor:
        """Remove the rows of finished prompts from the cache and from `last`."""
        going = [i for i, prompt in enumerate(self._rows) if not self._criteria[prompt].finished]
        if len(going) == len(self._rows):
            return last
        self._rows = [self._rows[i] for i in going]
        index = torch.tensor(going, dtype=torch.long, device="cpu")
        self._cache.keep_rows(index)
        return last[index.to(last.device)]


def can_batch(config: DecodingConfig) -> bool:
    """Return whether prompts can be continued together: what looks at one text alone cannot."""
    drafts_alone = config.mode != "self-speculative" or config.draft_from == "early-exit"
    return drafts_alone and config.repetition_penalty == 1.0


def batch_config(
    config: DecodingConfig,
    decoder: Decoder,
    measured: StepCosts | None,
    contexts: Sequence[int],
) -> DecodingConfig:
    """Return what `auto` does for several prompts: early exits draft, or plain where that is best.

    Args:
        config: what it resolves to for one prompt.
        decoder: the model.
        measured: see `generate`.
        contexts: number of tokens of each prompt.
    """
    if config.exit_layer is None:
        return config.plain()
    assert not isinstance(config.draft_vocabulary, int)
    share = len(config.draft_vocabulary or ()) / decoder.architecture.vocab_size or 1.0
    costs = DraftCosts.of(decoder, config.exit_layer, share, measured, contexts)
    assert config.draft_tokens is not None
    if not costs.batch_draft_tokens(len(contexts), config.draft_tokens, EXIT_ACCEPTANCE):
        return config.plain()
    return dataclasses.replace(config, draft_from="early-exit", datastore=None)


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Return which prompts of these lengths are continued together, the longest first.

    A group has `MAX_ROWS` prompts at most, and none of a length that would be little but padding. The
    prompts of a group stay in their order.
    """
    groups = list[list[int]]()
    width = total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total += lengths[i]
        padding = width * (len(groups[-1]) + 1) - total if groups else 0
        if not groups or len(groups[-1]) == MAX_ROWS or padding > max(total, _PADDING):
            groups.append([])
            width = total = lengths[i]
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def same_rotary_embedding(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> bool:
    """Return whether a batch rotates keys as each prompt alone: LongRoPE has factors for two lengths."""
    sizes = [StoppingCriteria.of(decoder, p, max_new_tokens).capacity for p in prompts]
    return same_rope_scaling(decoder, *sizes)
