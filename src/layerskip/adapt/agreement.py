"""Agreement of an adapter's drafts with the frozen model, on answers that it was not trained on."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from layerskip.adapt.loss import logits_of
from layerskip.adapt.network import AdapterNetwork, head_rows
from layerskip.adapt.teacher import TeacherSequence
from layerskip.model import Files
from layerskip.model.decoder import Decoder
from layerskip.model.draft_rule import CONFIDENCE_BINS
from layerskip.model.exit_adapter import (
    AcceptanceCounts,
    read_adapter,
    save_adapter,
)

EVAL_DEPTHS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of greedy drafts with the model's own greedy answers.

    Attributes:
        by_depth: for draft 1, 2, ... the share of tokens that agree if those before them do.
        tokens: number of answer tokens.
        by_confidence: the same tokens of all depths, by the draft's probability.
    """

    by_depth: tuple[float, ...]
    tokens: int
    by_confidence: AcceptanceCounts

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
    cap: float | None = None,
) -> Agreement:
    """Draft at every position of some answers.

    Args:
        network: the adapter.
        sequences: greedy answers.
        head: rows of the head for the draft vocabulary, [V, D].
        draft_vocabulary: token ids of these rows.
        cap: of the logits, or None.
    """
    ids = torch.tensor(list(draft_vocabulary))
    drafted = torch.zeros(EVAL_DEPTHS)
    agreed = torch.zeros(EVAL_DEPTHS)
    verified, accepted = torch.zeros(2, CONFIDENCE_BINS, dtype=torch.int64)
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
            logits = logits_of(rows * network.logit_scale, head, cap)
            right = ids[logits.argmax(dim=-1)] == target[depth:]
            survives = survives[: len(right)]
            drafted[depth] += int(survives.sum())
            confidence = logits.softmax(dim=-1).amax(dim=-1)
            bins = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            verified += bins[survives].bincount(minlength=CONFIDENCE_BINS)
            accepted += bins[survives & right].bincount(minlength=CONFIDENCE_BINS)
            survives = survives & right
            agreed[depth] += int(survives.sum())
    shares = (agreed / drafted.clamp(min=1)).tolist()
    counts = AcceptanceCounts(verified=tuple(verified.tolist()), accepted=tuple(accepted.tolist()))
    return Agreement(by_depth=tuple(shares), tokens=n_tokens, by_confidence=counts)


def write_acceptance(
    path: Path, base: Decoder, files: Files, sequences: Sequence[TeacherSequence]
) -> Agreement:
    """Measure the adapter of a file on held-out answers, and write what is accepted into the file.

    Args:
        path: of the adapter.
        base: the frozen model.
        files: of the base.
        sequences: greedy answers.
    """
    tensors, settings, ids = read_adapter(path)
    network = AdapterNetwork(base, tensors, math.log(settings.logit_scale))
    head, cap = head_rows(files, ids), base.architecture.logit_cap
    agreement = measure_agreement(network, sequences, head, ids, cap)
    settings = dataclasses.replace(settings, acceptance=agreement.by_confidence)
    save_adapter(path, tensors, settings, ids)
    return agreement
