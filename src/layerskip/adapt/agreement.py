"""Agreement of an adapter's drafts with the frozen model, on answers that it was not trained on."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.adapt.network import AdapterNetwork
from layerskip.adapt.teacher import TeacherSequence

EVAL_DEPTHS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of greedy drafts with the model's own greedy answers.

    Attributes:
        by_depth: for draft 1, 2, ... the share of tokens that agree if those before them do.
        tokens: number of answer tokens.
    """

    by_depth: tuple[float, ...]
    tokens: int

    @property
    def accepted(self) -> float:
        """Mean number of accepted tokens of a draft of `EVAL_DEPTHS` tokens."""
        total, survival = 0.0, 1.0
        for share in self.by_depth:
            survival *= share
            total += survival
        return total


@torch.no_grad()
def measure_agreement(
    network: AdapterNetwork,
    sequences: Sequence[TeacherSequence],
    head: Tensor,
    draft_vocabulary: Sequence[int],
) -> Agreement:
    """Draft at every position of some answers.

    Args:
        network: the adapter.
        sequences: greedy answers.
        head: rows of the head for the draft vocabulary, [V, D].
        draft_vocabulary: token ids of these rows.
    """
    ids = torch.tensor(list(draft_vocabulary))
    drafted = torch.zeros(EVAL_DEPTHS)
    agreed = torch.zeros(EVAL_DEPTHS)
    n_tokens = 0
    for sequence in sequences:
        first, n = sequence.prompt_length - 1, len(sequence)
        target = torch.tensor(sequence.tokens[first + 1 : n + 1])
        n_tokens += len(target)
        outputs = network.outputs(
            sequence.exit_states[None].float(), sequence.last_states[None].float(), EVAL_DEPTHS
        )
        survives = torch.ones(len(target), dtype=torch.bool)  # by the position a draft begins at
        for depth, hidden in enumerate(outputs):
            # The draft that begins at position t has its token of depth k at position t + k.
            rows = hidden[0, first + depth : n]
            right = ids[(rows.to(head.dtype) @ head.T).argmax(dim=-1)] == target[depth:]
            survives = survives[: len(right)]
            drafted[depth] += int(survives.sum())
            survives = survives & right
            agreed[depth] += int(survives.sum())
    shares = (agreed / drafted.clamp(min=1)).tolist()
    return Agreement(by_depth=tuple(shares), tokens=n_tokens)
