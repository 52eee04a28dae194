"""Logits to probabilities: the one definition that plain decoding, drafting and verification share.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerskip.decoding.arguments import integer
from layerskip.model import Decoder, Distributions, Draws, most_likely, pick, shares

_Numbers = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; above 0 divides the logits.
        top_k: keep the k most likely tokens (ties with the k-th stay).
        top_p: keep the smallest set of most likely tokens whose probability reaches p.
        min_p: keep tokens of at least min_p times the highest probability.
        repetition_penalty: above 1 makes tokens of the prompt and the answer so far less likely.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, it has to be 0 or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, it has to be 1 or above")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, it has to be above 0 and at most 1")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}, it has to be from 0 to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}, it has to be above 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def draws(self, generator: torch.Generator | None) -> Draws | None:
        """How a decoder draws by itself, without penalties; None where it cannot, or is greedy."""
        return None if self.greedy or self._cuts_off else Draws(self._divisor, generator)

    def penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Apply the repetition penalty.

        Args:
            logits: [..., V].
            seen: [..., V] bool, the tokens before each position; None where there is no penalty.
        """
        if seen is None:
            return logits
        logits = logits.float()
        penalty = self.repetition_penalty
        return torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def distributions(
        self, decoder: Decoder, hidden: Tensor, seen: Tensor | None = None
    ) -> Distributions:
        """What is drawn from after hidden states [B, T, D]; `seen` as for `penalize`."""
        if seen is None and not self._cuts_off:
            return decoder.distributions(hidden, self._divisor)
        return _OfLogits(decoder.logits(hidden), self, seen)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that a token is drawn from, [..., V] to [..., V] in float32.

        Only for temperatures above 0. Never all zero: the most likely token is always kept.
        """
        rows = logits.float().reshape(-1, logits.shape[-1])
        if logits.device.type != "cpu" or (len(rows) == 1 and not self._cuts_off):
            return self._dense(rows).view(logits.shape)
        # A row at a time stays in the caches, and its memory is used again.
        found = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for row, probabilities in zip(rows, found, strict=True):
            if self._cuts_off:
                index, kept = self._sparse(row.numpy())
                probabilities.numpy()[index] = kept
            else:
                probabilities.copy_(self._dense(row))
        return found.view(logits.shape)

    def _dense(self, logits: Tensor) -> Tensor:
        """All rows at once: where nothing is cut off, or a look at it would wait for the device."""
        size = logits.shape[-1]
        scores = (logits - logits.amax(dim=-1, keepdim=True)) / self._divisor
        if self.top_k is not None and self.top_k < size:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ordered = scores.topk(size, dim=-1).values
            mass = ordered.softmax(dim=-1)
            before = mass.cumsum(dim=-1) - mass
            count = (before < self.top_p).sum(dim=-1, keepdim=True).clamp(min=1)
            least = ordered.gather(-1, count - 1)
            # Of equal tokens at the edge the first ones, as many as are in the set.
            above, ties = scores > least, scores == least
            room = count - above.sum(dim=-1, keepdim=True)
            kept = above | (ties & (ties.cumsum(dim=-1) <= room))
            scores = scores.masked_fill(~kept, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if self.min_p:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def _sparse(self, logits: _Numbers) -> tuple[_Numbers | slice, _Numbers]:
        """Of one row [V], which tokens are kept, and their probabilities.

        As `_dense`, but what is cut off is not looked at again: on a CPU some operations over a whole
        vocabulary take as long as a layer.
        """
        size, best = len(logits), logits.max()
        index: _Numbers | slice = slice(None)
        if not np.isfinite(best):
            return index, np.full_like(logits, np.nan)
        if self.top_k is not None and self.top_k < size:
            least = np.partition(logits, size - self.top_k)[size - self.top_k]
            index = np.flatnonzero(logits >= least)
        weights = logits[index] - best
        with np.errstate(over="ignore"):  # to -inf, where the temperature is low
            weights /= self._divisor
        np.exp(weights, out=weights)
        whole, top_p = weights.sum(dtype=np.float64), 1.0 if self.top_p is None else self.top_p
        # What weighs less than an equal part of 1 - top_p weighs less than that with all that is below
        # it. Half of it, since sums are rounded. The best weighs 1.
        least = max(0.5 * (1.0 - top_p) * whole / len(weights), self.min_p or 0.0)
        if least > 0.0:
            few = np.flatnonzero(weights >= least)
            index, weights = few if isinstance(index, slice) else index[few], weights[few]
            if top_p < 1.0:
                few = _nucleus(weights, top_p * whole)
                index, weights = index[few], weights[few]
        return index, weights / weights.sum()

    @property
    def _cuts_off(self) -> bool:
        return any(bound is not None for bound in (self.top_k, self.top_p, self.min_p))

    @property
    def _divisor(self) -> float:
        """The temperature, as far as float32 can divide by it."""
        return max(self.temperature, torch.finfo(torch.float32).tiny)


class _OfLogits(Distributions):
    """Distributions that are made where one is looked at.

    On a CPU each may take longer than a layer of a small model, and behind the first rejected token
    nobody needs them.

    Args:
        logits: [B, T, V].
        sampling: of the answers.
        seen: as for `Sampling.penalize`.
    """

    def __init__(self, logits: Tensor, sampling: Sampling, seen: Tensor | None) -> None:
        self._logits, self._sampling, self._seen = logits, sampling, seen

    def __getitem__(self, at: Any) -> Tensor:
        """Those of some rows and positions, as a tensor's [B, T] would be indexed; float32."""
        seen = None if self._seen is None else self._seen[at]
        return self._sampling.probabilities(self._sampling.penalize(self._logits[at], seen))


def _nucleus(weights: _Numbers, wanted: float) -> _Numbers:
    """Which of the weights [n] are in the smallest set of the highest that weighs so much."""
    ordered = np.sort(weights)[::-1]
    before = ordered.cumsum(dtype=np.float64) - ordered
    count = max(1, int((before < wanted).sum()))
    least = ordered[count - 1]
    kept = np.flatnonzero(weights >= least)
    if len(kept) > count:  # of equal ones at the edge the first, as many as are in the set
        spare = np.flatnonzero(weights == least)[count - len(kept) :]
        kept = np.setdiff1d(kept, spare, assume_unique=True)
    return kept


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of each row, [B, V] to [B, 1], as likely as its weight; weights need not sum to 1.

    The token where the running sum passes a random share of the whole: one random number a row, where
    PyTorch's `multinomial` takes one for every token.

    Raises:
        ValueError: weights are no numbers, or all 0; on a GPU, where looking would wait for it, the
            token is then any.
    """
    return pick(weights, shares(len(weights), weights.device, generator))


def likeliest(decoder: Decoder, hidden: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The greedy choice at every position, [B, T, D] to [B, T]; `seen` as for `Sampling.penalize`."""
    if seen is None:
        return decoder.choose(hidden)
    return most_likely(sampling.penalize(decoder.logits(hidden), seen))


def next_token(
    decoder: Decoder,
    hidden: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    seen: Tensor | None = None,
) -> Tensor:
    """Choose one token after hidden states, [B, 1, D] to [B, 1]; `seen` as for `Sampling.penalize`."""
    if sampling.greedy:
        return likeliest(decoder, hidden, sampling, seen)
    share = shares(len(hidden), hidden.device, generator)
    return sampling.distributions(decoder, hidden, seen).draw(0, share)


def nth_seed(seed: int | None, i: int = 0) -> int | None:
    """The seed of the i-th of several answers, from 0; behind the last one the first follows.

    A negative seed draws what the one with the same 64 bits draws.

    Raises:
        ValueError: a seed that is no integer of 64 bits.
    """
    if seed is None:
        return None
    seed = integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, it has to fit into 64 bits")
    return (seed + i) % 2**64


def seeded_generator(device: torch.device, seed: int | None) -> torch.Generator:
    """A source of randomness; without a seed another one each time."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class TokenHistory:
    """Which tokens stand before a position; what the repetition penalty looks at."""

    def __init__(self, prompt: Tensor, vocab_size: int) -> None:
        """Start with a prompt [1, n]."""
        self._seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=prompt.device)
        self.extend(prompt)

    def extend(self, tokens: Tensor) -> None:
        """Add settled tokens [1, n]."""
        self._seen.scatter_(1, tokens, True)

    def before(self, tokens: Tensor) -> Tensor:
        """What is seen before each of the unsettled tokens, and after the last.

        Args:
            tokens: [1, n], not yet settled.

        Returns:
            [1, n + 1, V] bool; row i has seen the settled tokens and tokens[:, :i].
        """
        n = tokens.shape[1]
        seen = self._seen[:, None].repeat(1, n + 1, 1)
        for i in range(n):
            seen[:, i + 1 :].scatter_(2, tokens[:, i, None, None].expand(1, n - i, 1), True)
        return seen
