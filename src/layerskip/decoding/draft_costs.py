"""What drafting and verifying cost, in plain steps of one token: measured by tune, else from bytes read.

Nothing is timed while an answer is made, so the same prompt is always decoded in the same way.
"""

import dataclasses
import functools
from collections.abc import Sequence

from layerskip.decoding.short_head import ReducedHead
from layerskip.model import Decoder, StepCosts
from layerskip.model.step_timing import FAR, PassCosts, pass_costs

_ROW_COST_ON_A_GPU = 0.01
# What one more position adds to attention over a long context, as a share of what one takes, where that
# was not timed: keys and values are loaded once for several, but each has arithmetic of its own.
_ATTENTION_ROW = 0.5
# Seconds of what little is done for a draft and a verification beside their passes, which nothing reads
# bytes for: a fused step does without. Of a small model it is a tenth of a step.
_DRAFTING_S, _VERIFYING_S = 450e-6, 100e-6
_LEAST_GAIN = 1.03  # of a batch: below that drafting is not worth a try
_GROWTH = 64  # positions, of which no attention takes a time that counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftCosts:
    """Costs in units of a plain step.

    Attributes:
        layers: the first E layers over one token; 0 where there is no exit.
        head: the draft's exit over one token.
        passes: all layers and the head over 1, 2, ... positions, less `attention`; beyond its end
            every further position adds what those of the second half added on average.
        overhead: of a round that drafts by early exit, beside its parts.
        attention: over the contexts, for one position of each prompt.
        attention_row: what one more position adds to that, as a share of it.
        prompts: how many these are.
    """

    layers: float
    head: float
    passes: tuple[float, ...]
    overhead: float = 0.0
    attention: float = 0.0
    attention_row: float = _ATTENTION_ROW
    prompts: int = 1

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        exit_layer: int,
        head_share: float = 1.0,
        measured: StepCosts | None = None,
        contexts: Sequence[int] = (0,),
    ) -> "DraftCosts":
        """Costs of drafting with the first E layers (0 = none) and a share of the head's tokens.

        Without a measurement they are shares of the bytes read, and a pass over more positions costs
        what this machine was timed to take, or on a GPU an estimate. `contexts` has for each
        prompt how many positions attention looks back on, whose keys and values are read beside the
        weights, or take what this machine was timed to; of a measurement only those count that it was
        made without. Passes over several prompts reach beyond what was measured: there they grow as
        estimated.
        """
        depth = exit_layer / len(decoder.layers)
        machine = _of_machine(decoder) if measured is None or len(contexts) > 1 else None
        if measured is None:
            whole = decoder.weight_bytes
            layers = (whole - decoder.head.weight_bytes) / whole * depth
            head = head_share * decoder.head.weight_bytes / whole
            assert machine is not None
            one, *more = machine.passes
            passes = (one, *(cost + _VERIFYING_S / machine.seconds for cost in more))
            overhead = _DRAFTING_S / machine.seconds
        else:
            scored = measured.draft_tokens_scored / decoder.architecture.vocab_size
            timed = max(measured.draft_step - measured.head * scored, 0.0)
            layers = timed * exit_layer / measured.exit_layer
            head = measured.head * head_share
            passes, overhead = measured.passes, measured.overhead
            if machine is not None:
                passes = _longer(passes, machine.passes)
        counted = 0 if measured is None else measured.context
        share, row = _attention(decoder, contexts, counted, None if measured else machine)
        rest = 1.0 - share
        return cls(
            layers=rest * layers + share * depth,
            head=rest * head,
            passes=tuple(rest * cost for cost in passes),
            overhead=rest * overhead,
            attention=share,
            attention_row=row,
            prompts=len(contexts),
        )

    def over(self, positions: int, prompts: int = 1) -> float:
        """A pass of all layers and the head over 1 or more positions, of so many prompts."""
        further = positions / prompts - 1.0  # of each prompt
        attention = self.attention * prompts / self.prompts * (1.0 + further * self.attention_row)
        known = len(self.passes)
        if positions <= known:
            return self.passes[positions - 1] + attention
        middle = (known - 1) // 2
        each = (self.passes[-1] - self.passes[middle]) / max(known - 1 - middle, 1)
        return self.passes[-1] + (positions - known) * max(each, 0.0) + attention

    def rows(self, positions: int, more: int) -> float:
        """What more positions add to a pass over so many."""
        return max(self.over(positions + more) - self.over(positions), 0.0)

    def token(self, drafted: int) -> float:
        """What the early exit's next token costs after so many in this round, verified and all."""
        if drafted not in self._tokens:
            verified = (1 - self.layers) * self.rows(drafted + 1, 1)
            self._tokens[drafted] = self.layers + self.head + verified
        return self._tokens[drafted]

    @functools.cached_property
    def _tokens(self) -> dict[int, float]:
        """Answers of `token`, which is asked for several times a drafted token."""
        return {}

    def round(self, drafted: int, scored: int, between: int = 0) -> float:
        """A round whose early exit scored some tokens and kept `drafted`, with those of a text between.

        The first layers go over those together with the token before them.
        """
        drafting = (
            self.layers * (drafted + 1 - between + self.rows(1, between)) + self.head * scored
        )
        return drafting + (1 - self.layers) * self.over(drafted + 1) + self.overhead

    def batch_draft_tokens(self, rows: int, most: int, acceptance: float) -> int:
        """The draft length for so many prompts at once, at most `most`; 0 where plain is best.

        A pass over n tokens of each of B prompts is one over n * B positions. A drafted token whose
        predecessors are right is right with the probability `acceptance`, below 1.
        """
        step = self.over(rows, rows)
        best, longest = _LEAST_GAIN / step, 0
        for d in range(1, most + 1):
            tokens = (1 - acceptance ** (d + 1)) / (1 - acceptance)
            drafting = (self.layers * (d + 1) + self.head * d) * step
            time = drafting + (1 - self.layers) * self.over(rows * (d + 1), rows) + self.overhead
            if tokens / time > best:
                best, longest = tokens / time, d
            if 1 / (1 - acceptance) / time <= best:  # as many tokens as there can be
                break
        return longest


class ContextCosts:
    """`DraftCosts` over contexts that grow.

    Args: those of `DraftCosts.of`, without contexts, and the draft's head.
    """

    def __init__(
        self,
        decoder: Decoder,
        exit_layer: int | None,
        head: ReducedHead | None,
        measured: StepCosts | None,
    ) -> None:
        share = 1.0 if head is None else head.share
        self._over = functools.partial(DraftCosts.of, decoder, exit_layer or 0, share, measured)
        self._counted = 0

    def over(self, contexts: Sequence[int]) -> DraftCosts:
        """The costs over contexts of these lengths."""
        self._counted = max(contexts)
        return self._over(contexts)

    def grown(self, contexts: Sequence[int]) -> DraftCosts | None:
        """The same where they have grown so much since then that costs are others now, else None."""
        more = max(contexts) - self._counted
        return self.over(contexts) if more >= max(self._counted // 4, _GROWTH) else None


def time_rows(decoder: Decoder) -> None:
    """Time what a decoder's drafts will be weighed by, where this machine has not done so before."""
    _of_machine(decoder)


def _attention(
    decoder: Decoder, contexts: Sequence[int], counted: int, machine: PassCosts | None
) -> tuple[float, float]:
    """What attention over some contexts, less one that counts elsewhere, has of a step, and each row.

    By the machine's times, else by the bytes that are read.
    """
    read = sum(_keys_values(decoder, context) for context in contexts)
    more = max(read - _keys_values(decoder, counted), 0)
    times = machine and machine.attention
    if not times or not times[0]:
        return more / (read + decoder.weight_bytes), _ATTENTION_ROW
    of_layers = 1.0 - decoder.head.weight_bytes / decoder.weight_bytes
    took = times[0] * of_layers * more / _keys_values(decoder, FAR)
    rows = len(times) - 1
    return took / (1.0 + took), min((times[-1] - times[0]) / (rows * times[0]), 1.0)


def _keys_values(decoder: Decoder, context: int) -> int:
    """Bytes of keys and values that one position sees."""
    a = decoder.architecture
    positions = sum(
        context if window is None else min(context, window) for window in a.sliding_windows
    )
    return 2 * a.n_kv_heads * a.head_dim * decoder.dtype.itemsize * positions


def _longer(passes: tuple[float, ...], estimated: tuple[float, ...]) -> tuple[float, ...]:
    """Passes, and behind their end the estimated ones in proportion."""
    if len(estimated) <= len(passes):
        return passes
    factor = passes[-1] / estimated[len(passes) - 1]
    return passes + tuple(factor * cost for cost in estimated[len(passes) :])


def _of_machine(decoder: Decoder) -> PassCosts:
    if decoder.device.type != "cpu":
        return PassCosts((1.0, 1.0 + _ROW_COST_ON_A_GPU))
    return pass_costs(decoder)
