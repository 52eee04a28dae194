"""Logits to probabilities to tokens: one definition for plain decoding, drafting and verification.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerskip.model import NON_FINITE_MESSAGE, Decoder, argmax
from layerskip.options import check_options, integer, option

_Array = npt.NDArray[Any]
LogitsMask = Callable[[Sequence[int]], Tensor | None]
"""Returns the tokens that may follow an answer so far, [V] bool, for constrained decoding.

Its argument has the answer's committed and drafted tokens. None allows all of them; it is also right
after tokens that were not allowed, which will be rejected.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of choosing the next token; the default is greedy.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = option(
        0.0, "Divisor of the logits; 0 is greedy decoding.", at_least=0.0, metavar="T"
    )
    top_k: int | None = option(
        None, "Keep the k most likely tokens (ties with the k-th stay).", at_least=1, metavar="K"
    )
    top_p: float | None = option(
        None,
        "Keep the smallest set of most likely tokens whose probability reaches p.",
        above=0.0,
        at_most=1.0,
        metavar="P",
    )
    min_p: float | None = option(
        None,
        "Keep tokens of at least min_p times the highest probability.",
        at_least=0.0,
        at_most=1.0,
        metavar="P",
    )
    repetition_penalty: float = option(
        1.0, "Above 1 makes tokens of prompt and answer less likely.", above=0.0, metavar="R"
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from a token's logit for each time that the answer has it.",
        at_least=-2.0,
        at_most=2.0,
        metavar="P",
    )
    presence_penalty: float = option(
        0.0,
        "Subtracted from the logits of the tokens that the answer has.",
        at_least=-2.0,
        at_most=2.0,
        metavar="P",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def sampling(self) -> "Sampling":
        """These options alone, without those of subclasses."""
        names = (field.name for field in dataclasses.fields(Sampling))
        return Sampling(**{name: getattr(self, name) for name in names})

    @property
    def has_penalties(self) -> bool:
        """True where choices depend on the tokens before."""
        return bool(
            self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        )

    def penalize(self, logits: Tensor, seen: Tensor, counts: Tensor) -> Tensor:
        """Apply the repetition penalty (Keskar et al., 2019), then OpenAI's two.

        Args:
            logits: [..., V].
            seen: [..., V] bool, the tokens of prompt and answer before each position.
            counts: [..., V] float32, how often the answer has each token before.
        """
        logits = logits.float()
        penalty = self.repetition_penalty
        if penalty != 1.0:
            scaled = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, scaled, logits)
        if self.frequency_penalty or self.presence_penalty:
            present = (counts > 0).float()
            logits = logits - self.frequency_penalty * counts - self.presence_penalty * present
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution that tokens are sampled from, [..., V] to [..., V] float32.

        Only for temperatures above 0. The most likely token is always kept. On a CPU, `_truncated`
        replaces `_dense` where tokens are cut off, since sorting a vocabulary takes as long as layers.
        """
        rows = logits.float().reshape(-1, logits.shape[-1])
        if logits.device.type != "cpu" or not self._truncates:
            return self._dense(rows).view(logits.shape)
        probabilities = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for row, out in zip(rows.numpy(), probabilities.numpy(), strict=True):
            tokens, kept = self._truncated(row)
            out[tokens] = kept
        return probabilities.view(logits.shape)

    def _dense(self, logits: Tensor) -> Tensor:
        """Return the distributions of all rows [N, V], without waiting for the device."""
        size = logits.shape[-1]
        # Subtract the maximum first: a very low temperature would overflow.
        scores = (logits - logits.amax(dim=-1, keepdim=True)) / self._divisor
        if self.top_k is not None and self.top_k < size:
            threshold = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < threshold, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ordered = scores.topk(size, dim=-1).values
            mass = ordered.softmax(dim=-1)
            before = mass.cumsum(dim=-1) - mass
            count = (before < self.top_p).sum(dim=-1, keepdim=True).clamp(min=1)
            threshold = ordered.gather(-1, count - 1)
            # Of equal tokens at the edge keep the first ones, as many as the set has.
            above, ties = scores > threshold, scores == threshold
            room = count - above.sum(dim=-1, keepdim=True)
            kept = above | (ties & (ties.cumsum(dim=-1) <= room))
            scores = scores.masked_fill(~kept, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if self.min_p:
            threshold = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def _truncated(self, logits: _Array) -> tuple[_Array | slice, _Array]:
        """Return the tokens that are kept of one row [V], and their probabilities (as `_dense`)."""
        size, highest = len(logits), logits.max()
        tokens: _Array | slice = slice(None)
        if not np.isfinite(highest):
            return tokens, np.full_like(logits, np.nan)
        if self.top_k is not None and self.top_k < size:
            threshold = np.partition(logits, size - self.top_k)[size - self.top_k]
            tokens = np.flatnonzero(logits >= threshold)
        weights = logits[tokens] - highest
        with np.errstate(over="ignore"):  # to -inf, where the temperature is low
            weights /= self._divisor
        np.exp(weights, out=weights)
        total, top_p = weights.sum(dtype=np.float64), 1.0 if self.top_p is None else self.top_p
        # Tokens below an equal share of 1 - top_p cannot be in the nucleus; half of it, for rounding.
        threshold = max(0.5 * (1.0 - top_p) * total / len(weights), self.min_p or 0.0)
        if threshold > 0.0:
            kept = np.flatnonzero(weights >= threshold)
            tokens, weights = kept if isinstance(tokens, slice) else tokens[kept], weights[kept]
            if top_p < 1.0:
                kept = _nucleus(weights, top_p * total)
                tokens, weights = tokens[kept], weights[kept]
        return tokens, weights / weights.sum()

    @property
    def _truncates(self) -> bool:
        return any(bound is not None for bound in (self.top_k, self.top_p, self.min_p))

    @property
    def _divisor(self) -> float:
        """The temperature, as far as float32 can divide by it."""
        return max(self.temperature, torch.finfo(torch.float32).tiny)


def _nucleus(weights: _Array, mass: float) -> _Array:
    """Return the indices of the smallest set of the highest weights [n] that reaches a mass."""
    ordered = np.sort(weights)[::-1]
    before = ordered.cumsum(dtype=np.float64) - ordered
    count = max(1, int((before < mass).sum()))
    threshold = ordered[count - 1]
    kept = np.flatnonzero(weights >= threshold)
    if len(kept) > count:  # of equal ones at the edge the first, as many as the set has
        spare = np.flatnonzero(weights == threshold)[count - len(kept) :]
        kept = np.setdiff1d(kept, spare, assume_unique=True)
    return kept


class Sampler:
    """Chooses tokens of one generation: its options, source of randomness and token history.

    Args:
        sampling: options.
        device: of the logits.
        seed: of sampling; None = another one each time.
        prompt: [1, n], for penalties.
        vocab_size: V, for penalties.
        logits_mask: of constrained decoding.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device,
        seed: int | None = None,
        prompt: Tensor | None = None,
        vocab_size: int = 0,
        logits_mask: LogitsMask | None = None,
    ) -> None:
        self.sampling, self.greedy = sampling, sampling.greedy
        self.generator = None if self.greedy else seeded_generator(device, seed)
        self.history: TokenHistory | None = None
        self._mask, self._answer = logits_mask, list[int]()
        if sampling.has_penalties:
            if prompt is None:
                raise ValueError("penalties are for one prompt, not for a batch")
            self.history = TokenHistory(prompt, vocab_size)

    @property
    def changes_logits(self) -> bool:
        """True where penalties or a mask come between the model's logits and the choice."""
        return self.history is not None or self._mask is not None

    @property
    def takes_argmax(self) -> bool:
        """True where the most likely token by the model's own logits is chosen."""
        return self.greedy and not self.changes_logits

    def process(self, logits: Tensor, draft: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply penalties and mask to the logits of the last n of d + 1 positions, [B, n, V].

        Args:
            logits: after `draft[:, :d - n + 1]` and longer beginnings of the draft.
            draft: [B, d].
            token_ids: [V] int64, the token of each logit of a reduced head; None = all tokens.
        """
        n = logits.shape[1]
        kept = slice(None) if token_ids is None else token_ids
        if self.history is not None:
            seen, counts = (part[:, -n:, kept] for part in self.history.before(draft))
            logits = self.sampling.penalize(logits, seen, counts)
        if self._mask is not None:
            drafted: list[int] = draft[0].tolist()
            logits = logits.float().clone()
            for i in range(n):
                tokens = [*self._answer, *drafted[: len(drafted) - n + 1 + i]]
                allowed = self._mask(tokens)
                if allowed is not None:
                    allowed = allowed.to(logits.device)[kept]
                    logits[:, i].masked_fill_(~allowed, float("-inf"))
        return logits

    def target_tokens(self, decoder: Decoder, hidden: Tensor, draft: Tensor) -> Tensor:
        """Return the greedy choices [B, d + 1] after hidden states [B, d + 1, D] of a draft [B, d]."""
        if not self.changes_logits:
            return decoder.greedy_tokens(hidden)
        return argmax(self.process(decoder.logits(hidden), draft))

    def target_probs(
        self, decoder: Decoder, hidden: Tensor, draft: Tensor
    ) -> Callable[[int, int], Tensor]:
        """Return the distributions p after hidden states [B, d + 1, D] of a draft; see `probs_of`."""
        return self.probs_of(decoder.logits(hidden), draft)

    def probs_of(self, logits: Tensor, draft: Tensor) -> Callable[[int, int], Tensor]:
        """Return the distributions p of the model's logits [B, d + 1, V] at a draft [B, d].

        p(i, j) computes those of positions i to j - 1, [B, j - i, V].
        """
        logits = self.process(logits, draft)
        return lambda start, end: self.sampling.probabilities(logits[:, start:end])

    def next_tokens(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        """Choose one token after hidden states, [B, 1, D] to [B, 1].

        Raises:
            ValueError: the model's results are not finite (on a CPU; a GPU would have to be awaited).
        """
        nothing = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
        if self.greedy:
            return self.target_tokens(decoder, hidden, nothing)
        return self.sample(self.target_probs(decoder, hidden, nothing)(0, 1)[:, 0])[:, None]

    def sample(self, weights: Tensor) -> Tensor:
        """Sample one token of each row, [B, V] to [B]; weights need not sum to 1."""
        return sample(weights, self.generator)

    def commit(self, tokens: Sequence[int]) -> None:
        """Add tokens of the answer to the history."""
        if self.history is not None:
            self.history.extend(tokens)
        if self._mask is not None:
            self._answer += tokens


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position: log softmax of the model's logits, before any option.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log probability.
        top: the most likely token ids and their log probabilities, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Return the log probabilities of tokens and of the `top` most likely ones, for logits [n, V]."""
    logprobs = logits.float().log_softmax(dim=-1)
    highest = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    return tuple(
        TokenLogprobs(token, float(row[token]), tuple(zip(ids, values, strict=True)))
        for token, row, ids, values in zip(
            tokens, logprobs, highest.indices.tolist(), highest.values.tolist(), strict=True
        )
    )


def sample(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample one token of each row by inverting the cumulative distribution, [B, V] to [B].

    One uniform number a row, in float64, where `torch.multinomial` takes one for every token.

    Raises:
        ValueError: weights are not finite, or all 0 (on a CPU; on a GPU the token is then arbitrary).
    """
    u = torch.rand(len(weights), 1, dtype=torch.float64, device=weights.device, generator=generator)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    if weights.device.type == "cpu" and not bool((total > 0).all() & torch.isfinite(total).all()):
        raise ValueError(NON_FINITE_MESSAGE)
    index = torch.searchsorted(cumulative, u * total, right=True)
    # A number that is rounded up to the total is the last token that has a weight.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(index, last).clamp_(max=weights.shape[-1] - 1)[:, 0]


def nth_seed(seed: int | None, i: int = 0) -> int | None:
    """Return the seed of the i-th of several answers, modulo 2^64."""
    if seed is None:
        return None
    seed = integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, it has to fit into 64 bits")
    return (seed + i) % 2**64


def seeded_generator(device: torch.device, seed: int | None) -> torch.Generator:
    """Return a source of randomness; without a seed another one each time."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**64)
    return generator


class TokenHistory:
    """The tokens before a position, for the penalties of one row."""

    def __init__(self, prompt: Tensor, vocab_size: int) -> None:
        """Start with a prompt [1, n]."""
        self._seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=prompt.device)
        self._seen.scatter_(1, prompt, True)
        self._counts = torch.zeros(1, vocab_size, dtype=torch.float32, device=prompt.device)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens of the answer."""
        index = torch.tensor([tokens], device=self._seen.device)
        self._seen.scatter_(1, index, True)
        ones = torch.ones_like(index, dtype=torch.float32)
        self._counts.scatter_add_(1, index, ones)

    def before(self, draft: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens before each drafted token [1, n], and after the last.

        Row i of the results has the committed tokens and draft[:, :i].

        Returns:
            [1, n + 1, V] bool, those of prompt and answer, and [1, n + 1, V] float32, how often the
            answer has each.
        """
        n = draft.shape[1]
        seen, counts = (part[:, None].repeat(1, n + 1, 1) for part in (self._seen, self._counts))
        for i in range(n):
            index = draft[:, i, None, None].expand(1, n - i, 1)
            seen[:, i + 1 :].scatter_(2, index, True)
            counts[:, i + 1 :].scatter_add_(2, index, torch.ones_like(index, dtype=torch.float32))
        return seen, counts
