"""The frozen model's side of training: its states over texts, and over answers while it writes them.

The states that generation computes are the teacher's pass: nothing is run twice.
"""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding import DecodingConfig
from layerskip.decoding.batch import Batch
from layerskip.decoding.generate import Row, iter_exit_hidden_states
from layerskip.decoding.sampling import nth_seed
from layerskip.model import Decoder, KVCache

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


def write_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    exit_layer: int,
    config: DecodingConfig,
    *,
    eos_token_ids: Collection[int],
) -> list[TeacherSequence]:
    """Answer prompts as one batch, and keep the states.

    An answer ends early where it repeats itself: a loop teaches nothing.

    Args:
        decoder: the model.
        prompts: token ids.
        exit_layer: E.
        config: of plain decoding; the seeds of the rows follow its seed.
        eos_token_ids: tokens that end an answer.
    """
    batch, rows = Batch(decoder), list[_RecordedRow]()
    for i, prompt in enumerate(prompts):
        row_config = dataclasses.replace(config, seed=nth_seed(config.seed, i))
        rows.append(_RecordedRow(decoder, prompt, row_config, exit_layer, eos_token_ids))
        batch.add(rows[-1])
    for output in batch:
        if output.error is not None:
            raise output.error
        answer = output.row.context[output.row.prompt_tokens :]
        if len(answer) % _CHECK_EVERY == 0 and _loops(answer):
            batch.remove(output.row)
    return [
        TeacherSequence(
            tokens=row.context,
            prompt_length=row.prompt_tokens,
            exit_states=torch.cat(row.exit_states),
            last_states=torch.cat(row.last_states),
        )
        for row in rows
    ]


class _RecordedRow(Row):
    """A row of a batch that keeps the states of its tokens (a `StateReader` of itself)."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        config: DecodingConfig,
        exit_layer: int,
        eos_token_ids: Collection[int],
    ) -> None:
        super().__init__(decoder, prompt, config, eos_token_ids=eos_token_ids)
        self.num_layers = exit_layer
        self.exit_states: list[Tensor] = []
        self.last_states: list[Tensor] = []

    def start(self, cache: KVCache) -> None:
        """See `Row`."""
        super().start(cache)
        self.reader = self

    def read_states(self, exit_states: Tensor, last_states: Tensor) -> None:
        """See `StateReader`."""
        self.exit_states.append(exit_states[0].to(torch.bfloat16))
        self.last_states.append(last_states[0].to(torch.bfloat16))


def _loops(tokens: Sequence[int]) -> bool:
    """Return whether the last tokens are one piece, three times."""
    return any(
        len(tokens) >= 3 * n and tokens[-n:] == tokens[-2 * n : -n] == tokens[-3 * n : -2 * n]
        for n in range(1, _LONGEST_LOOP + 1)
    )
