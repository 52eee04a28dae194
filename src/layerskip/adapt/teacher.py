"""The frozen model's side of training: its states over texts, and over answers while it writes them.

The states that generation computes are the teacher's pass: nothing is run twice.
"""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding.generate import iter_exit_hidden_states
from layerskip.decoding.sampling import Sampler, Sampling
from layerskip.model import Decoder, KVCache

_PREFILL_POSITIONS = 512  # of all rows together
_CHECK_EVERY = 16  # tokens
_LONGEST_LOOP = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSequence:
    """Tokens with the states that the model had over them.

    Attributes:
        tokens: [T + 1] or [T]; the last token of an answer has no state.
        prompt_length: number of leading tokens that the model did not write.
        exit_states: [T, D] bfloat16, leaving layer E.
        last_states: [T, D] bfloat16, leaving layer L.
    """

    tokens: list[int]
    prompt_length: int
    exit_states: Tensor
    last_states: Tensor

    def __len__(self) -> int:
        return len(self.exit_states)


@torch.inference_mode()
def read_text(decoder: Decoder, tokens: Sequence[int], exit_layer: int) -> TeacherSequence:
    """Run a text through the model."""
    n_layers = len(decoder.layers)
    states: dict[int, list[Tensor]] = {exit_layer: [], n_layers: []}
    pieces = iter_exit_hidden_states(decoder, torch.tensor([tokens]), (exit_layer, n_layers))
    for _, layer, hidden in pieces:
        states[layer].append(hidden[0].to(torch.bfloat16))
    return TeacherSequence(
        tokens=list(tokens),
        prompt_length=len(tokens),
        exit_states=torch.cat(states[exit_layer]),
        last_states=torch.cat(states[n_layers]),
    )


@torch.inference_mode()
def write_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    exit_layer: int,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    seed: int,
) -> list[TeacherSequence]:
    """Answer prompts as one batch, and keep the states.

    An answer ends early where it repeats itself: a loop teaches nothing.
    """
    recorder = _Recorder(decoder, prompts, exit_layer, max_new_tokens)
    sampler = Sampler(sampling, decoder.device, seed)
    answers: list[list[int]] = [[] for _ in prompts]
    last = sampler.next_tokens(decoder, recorder.prefill())
    for n in range(1, max_new_tokens + 1):
        for row, token in zip(recorder.rows, last[:, 0].tolist(), strict=True):
            answers[row].append(token)
        checks = n % _CHECK_EVERY == 0
        going = [
            i
            for i, row in enumerate(recorder.rows)
            if answers[row][-1] not in eos_token_ids and not (checks and _loops(answers[row]))
        ]
        if not going or n == max_new_tokens:
            break
        if len(going) < len(recorder.rows):
            recorder.keep(going)
            last = last[torch.tensor(going)]
        last = sampler.next_tokens(decoder, recorder.step(last))
    return [
        TeacherSequence(
            tokens=[*prompt, *answer],
            prompt_length=len(prompt),
            exit_states=torch.cat(recorder.exit_states[row]),
            last_states=torch.cat(recorder.last_states[row]),
        )
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def _loops(tokens: Sequence[int]) -> bool:
    """Return whether the last tokens are one piece, three times."""
    return any(
        len(tokens) >= 3 * n and tokens[-n:] == tokens[-2 * n : -n] == tokens[-3 * n : -2 * n]
        for n in range(1, _LONGEST_LOOP + 1)
    )


class _Recorder:
    """Passes of a batch, whose states are kept for each prompt."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        exit_layer: int,
        max_new_tokens: int,
    ) -> None:
        self._decoder, self._prompts, self._exit_layer = decoder, prompts, exit_layer
        capacity = max(map(len, prompts)) + max_new_tokens
        self._cache: KVCache = decoder.new_cache(capacity, len(prompts))
        self.rows = list(range(len(prompts)))
        self.exit_states: list[list[Tensor]] = [[] for _ in prompts]
        self.last_states: list[list[Tensor]] = [[] for _ in prompts]

    def prefill(self) -> Tensor:
        """Run the prompts, padded on the right; return the last states, [B, 1, D]."""
        lengths = [len(prompt) for prompt in self._prompts]
        width = max(lengths)
        padded = torch.tensor([[*p, *[0] * (width - len(p))] for p in self._prompts])
        positions = max(1, _PREFILL_POSITIONS // len(lengths))
        for start in range(0, width, positions):
            chunk = padded[:, start : start + positions]
            self._run(chunk, [min(max(n - start, 0), chunk.shape[1]) for n in lengths])
            self._cache.lengths += chunk.shape[1]
        self._cache.lengths.copy_(torch.tensor(lengths))
        last = [states[-1][-1:] for states in self.last_states]
        return torch.stack(last).to(torch.float32)

    def step(self, tokens: Tensor) -> Tensor:
        """Run the newest tokens [B, 1]; return their states, [B, 1, D]."""
        hidden = self._run(tokens, [1] * len(tokens))
        self._cache.lengths += 1
        return hidden

    def keep(self, rows: list[int]) -> None:
        """Keep some rows of the batch alone."""
        self._cache.keep_rows(torch.tensor(rows))
        self.rows = [self.rows[i] for i in rows]

    def _run(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        decoder, cache = self._decoder, self._cache
        exit_states = decoder.run(decoder.embed(tokens), 0, self._exit_layer, cache)
        last_states = decoder.run(exit_states, self._exit_layer, len(decoder.layers), cache)
        for i, (row, n) in enumerate(zip(self.rows, counts, strict=True)):
            if n:
                self.exit_states[row].append(exit_states[i, :n].to(torch.bfloat16))
                self.last_states[row].append(last_states[i, :n].to(torch.bfloat16))
        return last_states
