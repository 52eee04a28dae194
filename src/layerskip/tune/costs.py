"""What a round costs on this machine: its parts and whole rounds, timed in turns.

The parts of all exits and draft lengths, whole rounds of the real step loop and plain steps are
measured in one shuffled order, over and over, so that a machine that slows down or speeds up does the
same to all of them. Every part is measured where it stands in a round: a draft after a verification,
a verification after a draft, so that caches are as cold as they will be. Medians are kept.
"""

import dataclasses
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from layerskip.decoding import Plan, Sampling, generate
from layerskip.decoding.accept import accept_greedy
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder
from layerskip.model.step_timing import device_clock

SWEEPS = 5
_LONG_DRAFT = 6  # a call of so many tokens against one of a single token gives a step's cost
ANCHORS = 4  # exits at which every length of verification is measured
_PLAIN_STEPS = 8  # a sweep: the denominator of every speedup deserves more samples
_WHOLE_ROUNDS = 2  # a sweep, of each exit and draft length that whole rounds are measured at
_GREEDY = Sampling()

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, at each of C context lengths, for X exits and passes over 1 ... n positions.

    Attributes:
        contexts: [C] positions that are settled when the part begins, ascending.
        exits: [X] layers run, ascending.
        plain_s: [C], one token of plain decoding.
        head_s: [C], final norm, head and choice for one position.
        first_draft_s: [C, X], a draft call of one token: it runs the first E layers twice, over the
            newest settled token and over the drafted one, and the head once.
        draft_step_s: [C, X], every further drafted token.
        verify_s: [C, X, n], layers [E, L), head and acceptance over 1 ... n positions.
        round_overhead_s: [C], what a whole round of the step loop takes beyond these parts.
    """

    contexts: list[int]
    exits: list[int]
    plain_s: NDArray[np.float64]
    head_s: NDArray[np.float64]
    first_draft_s: NDArray[np.float64]
    draft_step_s: NDArray[np.float64]
    verify_s: NDArray[np.float64]
    round_overhead_s: NDArray[np.float64]

    @property
    def middle(self) -> int:
        """Which of the contexts stands for all where one has to."""
        return len(self.contexts) // 2

    def round_s(self, exit_layer: int, drafted: int) -> NDArray[np.float64]:
        """A round that drafts so many tokens, at each context length, [C]; of none: a plain step."""
        if not drafted:
            return self.plain_s
        x = self.exits.index(exit_layer)
        draft = self.first_draft_s[:, x] + (drafted - 1) * self.draft_step_s[:, x]
        return np.maximum(draft, 0.0) + self.verify_s[:, x, drafted] + self.round_overhead_s

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, with nested lists."""
        fields = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


def measure_costs(
    decoder: Decoder,
    text: Sequence[int],
    *,
    contexts: Sequence[int],
    exits: Sequence[int],
    max_draft_tokens: int,
    sweeps: int = SWEEPS,
    progress: Progress = lambda done, total: None,
) -> Costs:
    """Time the parts of rounds at every exit.

    Args:
        decoder: the model.
        text: token ids to fill contexts with, repeated where they are short.
        contexts: context lengths to measure at.
        exits: layers run, each 1 ... L - 1.
        max_draft_tokens: verification is measured up to this many positions and one more.
        sweeps: how often everything is measured.
        progress: called after each part with the parts timed and those in all, of all sweeps.

    Raises:
        ValueError: the model's context is too short for the measurement.
    """
    # What the real step loops settle at most, the warm-up included, and a last draft in full.
    sweeps_of_all = 1 + sweeps
    reach = sweeps_of_all * _WHOLE_ROUNDS * (_LONG_DRAFT + 1) + max_draft_tokens + 2
    room = decoder.architecture.max_context - reach
    if room < 1:
        raise ValueError(
            f"this model's context holds {reach + room} tokens, measuring costs needs {reach + 1};"
            " try fewer draft tokens"
        )
    places = sorted({min(c, room) for c in contexts})
    order = random.Random(0)
    parts = []
    done = 0
    for context in places:
        filled = [text[j % len(text)] for j in range(context)]
        workbench = _Workbench(decoder, filled, exits, max_draft_tokens, reach)
        for sweep in range(sweeps_of_all):
            if sweep == 1:  # the first one is a warm-up
                workbench.times.clear()
            for _ in workbench.sweep(order):
                done += 1
                progress(done, len(places) * sweeps_of_all * len(workbench.works))
        parts.append(workbench.summary())
        del workbench  # its caches make room for the next one's
    columns = {name: np.array([part[name] for part in parts]) for name in parts[0]}
    return Costs(contexts=places, exits=list(exits), **columns)


class _Work(NamedTuple):
    """Something to time: a draft of d tokens and a verification of n positions, or a whole step."""

    kind: str
    exit_layer: int = 0
    drafted: int = 0
    verified: int = 0


class _Workbench:
    """One context length: a filled cache, real step loops, and what has been timed so far."""

    def __init__(
        self,
        decoder: Decoder,
        text: list[int],
        exits: Sequence[int],
        max_draft_tokens: int,
        reach: int,
    ) -> None:
        self.decoder, self.exits = decoder, exits
        self.clock = device_clock(decoder.device)
        self.times: dict[_Work, list[float]] = defaultdict(list)
        self.draft_lengths = (1, max(2, min(_LONG_DRAFT, max_draft_tokens)))
        self.longest = max(max_draft_tokens, self.draft_lengths[1]) + 1
        places = np.linspace(0, len(exits) - 1, min(ANCHORS, len(exits)))
        self.anchors = [exits[round(i)] for i in places]
        self.cache = decoder.new_cache(len(text) + self.longest + self.draft_lengths[1])
        self.newest = torch.tensor([text[-1:]], device=decoder.device)
        self._fill(text)
        self.settled = self.cache.lengths.clone()
        plans = {_Work("plain"): Plan(mode="plain")} | {
            _Work("round", e, d): Plan(mode="self-speculative", exit_layer=e, draft_tokens=d)
            for e in self.anchors[1:3] or self.anchors  # two: each has a cache of its own
            for d in self.draft_lengths
        }
        self.loops = {
            work: generate(decoder, text, plan=plan, sampling=_GREEDY, max_new_tokens=reach)
            for work, plan in plans.items()
        }
        for loop in self.loops.values():
            next(loop)  # the prompt's pass
        pairs = [_Work("pair", e, d, d + 1) for e in exits for d in self.draft_lengths]
        pairs += [_Work("pair", e, 1, n) for e in self.anchors for n in range(1, self.longest + 1)]
        rounds = [work for work in self.loops if work.kind == "round"] * _WHOLE_ROUNDS
        self.works = [*pairs, *rounds, *[_Work("head"), _Work("plain")] * _PLAIN_STEPS]

    @torch.inference_mode()
    def _fill(self, text: list[int]) -> None:
        for chunk in torch.tensor([text], device=self.decoder.device).split(PREFILL_CHUNK, dim=1):
            hidden = self.decoder.embed(chunk)
            self.decoder.run(hidden, 0, len(self.decoder.layers), self.cache)
            self.cache.lengths += chunk.shape[1]

    def sweep(self, order: random.Random) -> Iterator[_Work]:
        """Time everything once, in a new order; what has been timed is told at once."""
        for work in order.sample(self.works, len(self.works)):
            if work.kind == "pair":
                self._pair(work)
            elif work.kind == "head":
                self._head()
            else:
                started = self.clock()
                next(self.loops[work])
                self.times[work].append(self.clock() - started)
            yield work

    @torch.inference_mode()
    def _pair(self, work: _Work) -> None:
        """A draft, then a verification, as in `decoding.generate`, with the clock between them."""
        _, e, d, n = work
        drafter = EarlyExitDrafter(self.decoder, e, _GREEDY)
        tokens = self.newest.expand(1, n - 1)
        states = self.decoder.embed(self.newest.expand(1, n))
        started = self.clock()
        drafter.draft(self.newest, d, self.cache, None, None)
        drafted = self.clock()
        self.cache.lengths.copy_(self.settled)
        hidden = self.decoder.run(states, e, len(self.decoder.layers), self.cache)
        accepted, _ = accept_greedy(tokens, self.decoder.choose(hidden))
        accepted.tolist()
        verified = self.clock()
        self.times[_Work("draft", e, d)].append(drafted - started)
        self.times[_Work("verify", e, 0, n)].append(verified - drafted)

    @torch.inference_mode()
    def _head(self) -> None:
        hidden = self.decoder.embed(self.newest)
        started = self.clock()
        self.decoder.choose(hidden)
        self.times[_Work("head")].append(self.clock() - started)

    def summary(self) -> dict[str, Any]:
        """Medians, as the fields of `Costs` at this context length."""
        median = {work: statistics.median(times) for work, times in self.times.items()}
        short, long = self.draft_lengths
        first = np.array([median[_Work("draft", e, short)] for e in self.exits])
        whole = np.array([median[_Work("draft", e, long)] for e in self.exits])
        step = (whole - first) / (long - short)
        lengths = range(1, self.longest + 1)
        verify = np.array(
            [
                np.interp(
                    self.exits,
                    self.anchors,
                    [median[_Work("verify", e, 0, n)] for e in self.anchors],
                )
                for n in lengths
            ]
        ).T
        overheads = []
        for work in self.loops:
            if work.kind == "round":
                x = self.exits.index(work.exit_layer)
                parts = first[x] + (work.drafted - 1) * step[x] + verify[x, work.drafted]
                overheads.append(median[work] - parts)
        return {
            "plain_s": median[_Work("plain")],
            "head_s": median[_Work("head")],
            "first_draft_s": first,
            "draft_step_s": step,
            "verify_s": verify,
            "round_overhead_s": statistics.fmean(overheads),
        }
