"""Logits to probabilities: the one definition that plain decoding, drafting and verification share.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from layerskip.model import Decoder, most_likely


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

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that a token is drawn from, [..., V] to [..., V] in float32.

        Only for temperatures above 0. Never all zero: the most likely token is always kept.
        """
        scores = logits.float()
        # Counted from the best score, so that no temperature, however low, overflows at the top.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        scores = scores / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ordered = _descending(scores)
            p = ordered.softmax(dim=-1)
            beyond = p.cumsum(dim=-1) - p >= self.top_p  # the mass before the token is enough
            beyond[..., 0] = False  # also where top_p is too small for float32
            least = ordered.masked_fill(beyond, float("inf")).amin(dim=-1, keepdim=True)
            above, ties = scores > least, scores == least
            # Of equal tokens at the edge the first ones, as many as are in the set.
            room = (~beyond).sum(dim=-1, keepdim=True) - above.sum(dim=-1, keepdim=True)
            kept = above | (ties & (ties.cumsum(dim=-1) <= room))
            scores = scores.masked_fill(~kept, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if self.min_p:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities


def _descending(scores: Tensor) -> Tensor:
    """Scores in float32, [..., V], the highest first."""
    if scores.device.type == "cpu":  # NumPy's sort was eight times as fast as PyTorch's
        return torch.from_numpy(np.sort(scores.numpy())).flip(-1)
    return scores.sort(dim=-1, descending=True).values


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
    logits = sampling.penalize(decoder.logits(hidden), seen)
    return pick(logits, sampling, generator)[0]


def pick(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Choose one token from logits [B, 1, V].

    Returns:
        The token [B, 1], and the distribution [B, 1, V] that it was drawn from (None if greedy).
    """
    if sampling.greedy:
        return most_likely(logits), None
    probabilities = sampling.probabilities(logits)
    return torch.multinomial(probabilities[:, 0], 1, generator=generator), probabilities


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
