"""Which drafted tokens stand, and the token that follows them. Pure functions, no model.

Both return (accepted, following): accepted [B] counts the leading drafted tokens that stand, following
[B] is the model's own token after them. With p the model's distribution and q the draft's, the tokens
that come out are distributed exactly as p, whatever q is (Leviathan et al., 2023, theorem 3.5).
"""

import torch
from torch import Tensor

from layerskip.decoding.drawn_from import DrawnFrom
from layerskip.decoding.sampling import Sampling, draw, likeliest
from layerskip.model import Decoder, Distributions, shares

_TRIES = 16  # of which all fail so seldom that it may take its time


def accept(
    drafted: Tensor,
    q: DrawnFrom | None,
    decoder: Decoder,
    hidden: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy or sampled acceptance, as the answer is sampled.

    Args:
        drafted: [B, d] int64.
        q: what they were drawn from; None if greedy or d = 0.
        decoder: the model, whose head judges.
        hidden: [B, d + 1, D], what the last layer gave for the positions before each drafted token, and
            after the last.
        sampling: of draft and model alike.
        generator: source of randomness, on the device of the hidden states.
        seen: as for `Sampling.penalize`.

    Returns:
        How many drafted tokens stand [B], and the model's own token after them [B, 1].
    """
    if sampling.greedy:
        accepted, following = accept_greedy(drafted, likeliest(decoder, hidden, sampling, seen))
    else:
        p = sampling.distributions(decoder, hidden, seen)
        accepted, following = accept_sampled(drafted, q, p, generator)
    return accepted, following[:, None]


def accept_greedy(drafted: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while the draft agrees with the model's most likely token.

    Args:
        drafted: [B, d] int64.
        best: [B, d + 1] int64, the model's, at the positions of the drafted tokens and one after.
    """
    compared = _compared_in_turn if drafted.device.type == "cpu" else _compared_at_once
    return compared(drafted, best)


def _compared_in_turn(drafted: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Where looking costs less than operations."""
    counts, following = list[int](), list[int]()
    for tokens, own in zip(drafted.tolist(), best.tolist(), strict=True):
        pairs = enumerate(zip(tokens, own, strict=False))
        counts.append(next((i for i, (token, its) in pairs if token != its), len(tokens)))
        following.append(own[counts[-1]])
    return torch.tensor(counts, device="cpu"), torch.tensor(following, device="cpu")


def _compared_at_once(drafted: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a device that is not to be waited for."""
    accepted = _leading(drafted == best[:, :-1])
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    drafted: Tensor,
    q: Tensor | DrawnFrom | None,
    p: Tensor | Distributions,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept token x with probability min(1, p(x) / q(x)); after a rejection draw from max(p - q, 0).

    Args:
        drafted: [B, d] int64, each drawn from its row of q.
        q: [B, d, V] float32, or what gives its parts: the distributions that the draft really used;
            None where d = 0.
        p: [B, d + 1, V] float32, or what gives its parts: the model's, under the same temperature,
            top-k, top-p and min-p.
        generator: source of randomness, on the device of p.
    """
    b, d = drafted.shape
    p = p if isinstance(p, Distributions) else Distributions(p)
    if q is None or not d:
        nothing = torch.zeros(b, dtype=torch.long, device=drafted.device)
        return nothing, p.draw(0, shares(b, drafted.device, generator))[:, 0]
    q_drafted = q.chances if isinstance(q, DrawnFrom) else q.gather(2, drafted[..., None])[..., 0]
    # In float64: of 2^24 numbers one would accept the least probable token of an n-gram.
    chance = torch.rand(b, d, dtype=torch.float64, device=drafted.device, generator=generator)
    least = chance * q_drafted
    if isinstance(q, DrawnFrom) and p.looked_up:
        return _looked_up(drafted, q, p, least, generator)
    judged = _in_turn if drafted.device.type == "cpu" else _at_once
    accepted, weights = judged(drafted, q, p, least)
    return accepted, draw(weights, generator)[:, 0]


def _looked_up(
    drafted: Tensor,
    q: DrawnFrom,
    p: Distributions,
    least: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """How many tokens of each row stand, whose p(x) is above the least [B, d], and the model's own [B].

    Of distributions no more is looked at than some numbers.
    """
    counts, own = list[int](), list[int]()
    for row, (tokens, limits) in enumerate(zip(drafted.tolist(), least.tolist(), strict=True)):
        count = 0
        while count < len(tokens) and limits[count] < p.chance(row, count, tokens[count]):
            count += 1
        counts.append(count)
        if count < len(tokens):
            own.append(_beyond(q, p, row, count, generator))
        else:
            own.append(p.pick(row, count, float(shares(1, drafted.device, generator))))
    return torch.tensor(counts, device="cpu"), torch.tensor(own, device="cpu")


def _beyond(
    q: DrawnFrom, p: Distributions, row: int, i: int, generator: torch.Generator | None
) -> int:
    """A token drawn from what p has above q: one of p's, kept with the probability 1 - q / p.

    One try of so many on average, over all tokens that are rejected or not.
    """
    tries = torch.rand(_TRIES, 2, dtype=torch.float64, generator=generator)
    for share, at_least in tries.tolist():
        token = p.pick(row, i, share)
        # Not where q is no number, so that any token of p will do.
        if not at_least * p.chance(row, i, token) <= q.chance(row, i, token):
            return token
    return int(draw(_residual(p[row, i], q[row, i])[None], generator))


def _in_turn(
    drafted: Tensor, q: Tensor | DrawnFrom, p: Distributions, least: Tensor
) -> tuple[Tensor, Tensor]:
    """How many tokens of each row stand, as in `_looked_up`, and what to draw from, [B, V].

    Of the model's distributions none is looked at behind the first token that does not stand.
    """
    counts, weights = list[int](), list[Tensor]()
    for row, (tokens, limits) in enumerate(zip(drafted.tolist(), least.tolist(), strict=True)):
        count, own = 0, p[row, 0]
        while count < len(tokens) and limits[count] < float(own[tokens[count]]):
            count += 1
            own = p[row, count]
        counts.append(count)
        weights.append(own if count == len(tokens) else _residual(own, q[row, count]))
    return torch.tensor(counts, device="cpu"), torch.stack(weights)


def _at_once(
    drafted: Tensor, q: Tensor | DrawnFrom, p: Distributions, least: Tensor
) -> tuple[Tensor, Tensor]:
    """The same on a device that is not to be waited for."""
    d, found = drafted.shape[1], p[:, :]
    q = q.whole if isinstance(q, DrawnFrom) else q
    accepted = _leading(least < found[:, :-1].gather(2, drafted[..., None])[..., 0])
    # After a full acceptance there is no draft to correct: the residual is p itself.
    corrected = (accepted < d)[:, None]
    drawn_from = corrected * _at(q, accepted.clamp(max=d - 1))
    return accepted, _residual(_at(found, accepted), drawn_from)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """What p [..., V] has above q, not normalised."""
    above = (p - q).clamp_(min=0.0)
    # Where p and q are equal to the last bit, rounding alone can reject; p is the right answer then.
    return torch.where(above.sum(-1, keepdim=True) > 0, above, p)


def _leading(stands: Tensor) -> Tensor:
    """How many entries of each row are true before the first false one, [B, d] to [B]."""
    return stands.cumprod(dim=1).sum(dim=1)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b]] for every b."""
    return rows[torch.arange(rows.shape[0], device=rows.device), index]
