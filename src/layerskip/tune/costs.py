"""Costs of a round on this machine: its parts and whole rounds, timed in interleaved order.

The parts of all exits and draft lengths, whole rounds of the decoding loop and plain steps are timed in
one shuffled order, repeatedly, so that a change of the machine's speed affects all of them alike. A
draft is timed after a verification and a verification after a draft, so that CPU caches are as cold as
in a round. Medians are kept.
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

from layerskip.decoding import DecodingConfig, Sampling, generate
from layerskip.decoding.accept import accept_greedy
from layerskip.decoding.drafters import Draft, EarlyExit
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.decoding.sampling import Sampler
from layerskip.model import Decoder
from layerskip.model.step_timing import device_clock

SWEEPS = 5
_LONG_DRAFT = 6  # the difference to a draft of one token gives the cost of a draft step
ANCHORS = 4  # exits at which every length of verification is measured
_PLAIN_STEPS = 8  # a sweep; more, since they are the denominator of every speedup
_WHOLE_ROUNDS = 2  # a sweep, for each exit and draft length with whole rounds

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds at each of C context lengths, for X exits and passes over 1 to n positions.

    Attributes:
        contexts: [C] number of committed positions when the part begins, ascending.
        exits: [X] layers run, ascending.
        plain_s: [C], a step of plain decoding.
        head_s: [C], final norm, head and argmax for one position.
        first_draft_s: [C, X], a draft of one token: the first E layers twice, over the newest committed
            token and the drafted one, and the head once.
        draft_step_s: [C, X], every further drafted token.
        verify_s: [C, X, n], layers E to L, head and acceptance over 1 to n positions.
        round_overhead_s: [C], the rest of a whole round of the decoding loop.
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
        """Index of the middle context."""
        return len(self.contexts) // 2

    def round_s(self, exit_layer: int, drafted: int) -> NDArray[np.float64]:
        """Return the seconds [C] of a round that drafts so many tokens; of none: a plain step."""
        if not drafted:
            return self.plain_s
        x = self.exits.index(exit_layer)
        draft = self.first_draft_s[:, x] + (drafted - 1) * self.draft_step_s[:, x]
        return np.maximum(draft, 0.0) + self.verify_s[:, x, drafted] + self.round_overhead_s

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with nested lists."""
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
        text: token ids of the context, repeated where they are too few.
        contexts: context lengths to measure at.
        exits: layers run, each 1 to L - 1.
        max_draft_tokens: verification is timed up to one more position.
        sweeps: number of times that everything is timed.
        progress: called after each part with the number of parts timed, and in all.

    Raises:
        ValueError: the model's context is too short for the measurement.
    """
    # Positions that the decoding loops commit at most, with the warm-up, and a last draft in full.
    sweeps_of_all = 1 + sweeps
    reach = sweeps_of_all * _WHOLE_ROUNDS * (_LONG_DRAFT + 1) + max_draft_tokens + 2
    longest = decoder.architecture.max_context - reach
    if longest < 1:
        raise ValueError(
            f"this model's context holds {reach + longest} tokens, measuring costs needs {reach + 1};"
            " try fewer draft tokens"
        )
    lengths = sorted({min(c, longest) for c in contexts})
    order = random.Random(0)
    parts = []
    n_done = 0
    for context in lengths:
        tokens = [text[j % len(text)] for j in range(context)]
        workbench = _Workbench(decoder, tokens, exits, max_draft_tokens, reach)
        for sweep in range(sweeps_of_all):
            if sweep == 1:  # the first one is a warm-up
                workbench.times.clear()
            for _ in workbench.sweep(order):
                n_done += 1
                progress(n_done, len(lengths) * sweeps_of_all * len(workbench.works))
        parts.append(workbench.summary())
        del workbench  # frees its caches
    columns = {name: np.array([part[name] for part in parts]) for name in parts[0]}
    return Costs(contexts=lengths, exits=list(exits), **columns)


class _Work(NamedTuple):
    """A piece of work to time: a draft of d tokens with a verification of n positions, or a step."""

    kind: str
    exit_layer: int = 0
    drafted: int = 0
    verified: int = 0


class _Workbench:
    """Times one context length, with a filled cache and real decoding loops."""

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
        self.sampler = Sampler(Sampling(), decoder.device)
        self.times: dict[_Work, list[float]] = defaultdict(list)
        self.draft_lengths = (1, max(2, min(_LONG_DRAFT, max_draft_tokens)))
        self.longest = max(max_draft_tokens, self.draft_lengths[1]) + 1
        indices = np.linspace(0, len(exits) - 1, min(ANCHORS, len(exits)))
        self.anchors = [exits[round(i)] for i in indices]
        self.cache = decoder.new_cache(len(text) + self.longest + self.draft_lengths[1])
        self.newest = torch.tensor([text[-1:]], device=decoder.device)
        self._fill(text)
        self.committed = self.cache.lengths.clone()
        plain = DecodingConfig(mode="plain", max_new_tokens=reach)
        configs = {_Work("plain"): plain} | {
            _Work("round", e, d): dataclasses.replace(
                plain,
                mode="self-speculative",
                draft_from="early-exit",
                exit_layer=e,
                draft_tokens=d,
            )
            for e in self.anchors[1:3] or self.anchors  # two: each has a cache of its own
            for d in self.draft_lengths
        }
        self.loops = {work: generate(decoder, text, config) for work, config in configs.items()}
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
        """Time everything once, in a new order, and yield each piece of work when it is done."""
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
        """Time a draft and a verification as in `decoding.generate`."""
        _, e, d, n = work
        drafter = EarlyExit(self.decoder, e, self.sampler)
        tokens = self.newest.expand(1, n - 1)
        states = self.decoder.embed(self.newest.expand(1, n))
        started = self.clock()
        draft = Draft(self.newest, self.cache)
        for _ in range(d):
            draft.extend(drafter.propose(draft, 1), 1, drafter.name)
        draft.hidden_states(self.decoder, e)  # runs the first layers over the last drafted token
        drafted = self.clock()
        _, target, _ = self.decoder.greedy_pass(
            states, (e, len(self.decoder.layers)), self.cache, n_scored=n
        )
        ids: list[int] = torch.cat([tokens, target], dim=1)[0].tolist()
        accept_greedy(ids[: n - 1], ids[n - 1 :])
        verified = self.clock()
        self.times[_Work("draft", e, d)].append(drafted - started)
        self.times[_Work("verify", e, 0, n)].append(verified - drafted)

    @torch.inference_mode()
    def _head(self) -> None:
        hidden = self.decoder.embed(self.newest)
        started = self.clock()
        self.decoder.greedy_tokens(hidden)
        self.times[_Work("head")].append(self.clock() - started)

    def summary(self) -> dict[str, Any]:
        """Return medians, as the fields of `Costs` at this context length."""
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
