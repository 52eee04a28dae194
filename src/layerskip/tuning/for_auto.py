"""What mode auto is told of a tuning: costs in plain steps, and the tokens worth drafting."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from layerskip.decoding import LayerSkipModel
from layerskip.model import StepCosts
from layerskip.model.draft_vocabulary import MOST, worth_drafting
from layerskip.model.files.draft_text import MOST as MOST_OF_TEXT
from layerskip.model.native import threads_of
from layerskip.model.timing import costs_kind
from layerskip.tuning.costs import Costs

_LEAST = 1e-3  # of a plain step: differences of medians can come out at nothing
_LEAST_OF_AN_ANSWER = 8  # tokens: what is shorter stands in other answers, too
_SHARE_OF_VOCABULARY = 4  # a quarter: its first tokens, for a checkpoint that has no list yet


def step_costs(costs: Costs, exit_layer: int, model: LayerSkipModel) -> StepCosts:
    """The costs at the middle context, in plain steps, drafting at one exit through the whole head.

    A pass over n positions is taken to grow with n as the verification from that exit does.
    """
    middle, x = costs.middle, costs.exits.index(exit_layer)
    plain, verify = float(costs.plain_s[middle]), costs.verify_s[middle, x]
    dtype, weights, device, kernels, machine = costs_kind(model.decoder)
    return StepCosts(
        dtype=dtype,
        weights=weights,
        device=device,
        kernels=kernels,
        machine=machine,
        threads=threads_of(kernels) if device == "cpu" else 0,
        exit_layer=exit_layer,
        draft_step=max(float(costs.draft_step_s[middle, x]) / plain, _LEAST),
        draft_tokens_scored=model.decoder.architecture.vocab_size,
        head=max(float(costs.head_s[middle]) / plain, _LEAST),
        passes=tuple(float(seconds / verify[0]) for seconds in verify),
        overhead=max(float(costs.round_overhead_s[middle]) / plain, 0.0),
        context=costs.contexts[middle],
    )


def draft_text(answers: Iterable[Sequence[int]], known: Sequence[int] | None) -> tuple[int, ...]:
    """A text, and behind it some answers that it has not, each once."""
    text = _letters(known or ())
    once = dict.fromkeys(tuple(answer) for answer in answers if _letters(answer) not in text)
    return tuple(itertools.chain(known or (), *once))[:MOST_OF_TEXT]


def text_without(
    answers: Iterable[Sequence[int]], known: Sequence[int] | None
) -> tuple[int, ...] | None:
    """A draft text less these answers, which tuning on the same prompts may have put there before."""
    if known is None:
        return None
    text = _letters(known)
    for answer in answers:
        if len(answer) >= _LEAST_OF_AN_ANSWER:
            text = text.replace(_letters(answer), "")
    return tuple(map(ord, text))


def _letters(tokens: Sequence[int]) -> str:
    """A letter for each token, since texts can be searched."""
    return "".join(map(chr, tokens))


def draft_vocabulary(
    texts: Iterable[Sequence[int]], model: LayerSkipModel
) -> tuple[int, ...] | None:
    """The tokens of some prompts and answers, then those that the checkpoint has already.

    A checkpoint without a list gets the first quarter of its vocabulary behind them, since so few texts
    do not have all that answers are made of.
    """
    a = model.decoder.architecture
    counts = Counter(token for text in texts for token in text)
    row = model.decoder.head.weight_bytes / a.vocab_size
    seen = worth_drafting(
        counts,
        row_share=row / model.decoder.weight_bytes,
        vocab_size=a.vocab_size,
        always=sorted(token for token in model.end_tokens if token < a.vocab_size),
    )
    known = model.settings.draft_vocabulary or range(a.vocab_size // _SHARE_OF_VOCABULARY)
    return None if seen is None else tuple(dict.fromkeys([*seen, *known]))[:MOST]
