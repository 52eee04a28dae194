"""Logit lens: final norm and head applied to the hidden states between the layers of one pass."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip.decoding import Step, iter_exit_hidden_states
from layerskip.model import Decoder

_VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


class Symbols:
    """Printable text of each token; `symbols[id]`."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a transformers tokenizer, or None to print ids."""
        self._tokenizer = tokenizer
        self._symbol = functools.cache(self._make)

    def __getitem__(self, token_id: int) -> str:
        return self._symbol(token_id)

    def _make(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"#{token_id}"
        # Some tokenizers drop the space before the first token: decode it twice and take the second.
        once, twice = (self._decode([token_id] * n) for n in (1, 2))
        return visible(twice[len(once) :]) or f"#{token_id}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """Return the text with symbols or codes for characters that are not printed as they are.

    These are white space, control characters, and characters that change the direction of writing.
    """
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


CHUNK = 64  # positions whose logits are computed at a time
TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lens:
    """Predictions of X exits at P positions of a text.

    The prediction at a position is made from the tokens before it, so the first position is 1.

    Attributes:
        token_ids: the text, prompt and answer.
        prompt_tokens: number of tokens of the prompt.
        exits: X exit layers (layers run), ascending; the last is the whole model.
        positions: P neighbouring positions, each 1 to len(token_ids) - 1.
        top_ids: [X, P, k] int64, the most likely tokens in descending order.
        top_probabilities: [X, P, k] float32.
        answer_probabilities: [X, P] float32, each exit's probability of the last layer's top token.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    exits: tuple[int, ...]
    positions: range
    top_ids: Tensor
    top_probabilities: Tensor
    answer_probabilities: Tensor

    @property
    def agrees(self) -> Tensor:
        """[X, P] bool: the exit's top token is that of the last layer."""
        top = self.top_ids[:, :, 0]
        return top == top[-1]

    @property
    def saturation_layers(self) -> list[int]:
        """The saturation layer of each position: the first of the exits from which on all agree.

        The term is that of Geva et al. (2022), arXiv 2203.14680.
        """
        n_agreeing = self.agrees.flip(0).long().cumprod(0).sum(0)  # counted from the last layer
        return [self.exits[-n] for n in n_agreeing.tolist()]

    @property
    def settled(self) -> list[int]:
        """Deprecated name of `saturation_layers`."""
        return self.saturation_layers

    def best(self, row: int, column: int) -> list[tuple[int, float]]:
        """Return the top tokens of an exit (row) at a position (column) with their probabilities."""
        ids, probabilities = self.top_ids[row, column], self.top_probabilities[row, column]
        return list(zip(ids.tolist(), probabilities.tolist(), strict=True))

    def part(self, positions: range) -> "Lens":
        """Return the lens of a range of positions, as far as this one has them.

        Raises:
            ValueError: it has none of them.
        """
        start = max(positions.start, self.positions.start)
        stop = min(positions.stop, self.positions.stop)
        if start >= stop:
            raise ValueError(
                f"positions {positions.start} to {positions.stop - 1} are not there:"
                f" there are {self.positions.start} to {self.positions.stop - 1}"
            )
        columns = slice(start - self.positions.start, stop - self.positions.start)
        return dataclasses.replace(
            self,
            positions=range(start, stop),
            top_ids=self.top_ids[:, columns],
            top_probabilities=self.top_probabilities[:, columns],
            answer_probabilities=self.answer_probabilities[:, columns],
        )

    @property
    def answer_positions(self) -> range:
        """The positions of the lens that belong to the answer."""
        return range(max(self.prompt_tokens, self.positions.start), self.positions.stop)


@torch.inference_mode()
def look(
    decoder: Decoder,
    token_ids: Sequence[int],
    *,
    prompt_tokens: int,
    exits: Collection[int] | None = None,
    start: int = 1,
    top: int = TOP,
    capacity: int | None = None,
) -> Lens:
    """Compute the predictions of every exit layer, in one pass over a text.

    Args:
        decoder: the model.
        token_ids: prompt and answer, 2 tokens or more.
        prompt_tokens: number of tokens of the prompt.
        exits: exit layers, each 1 to L; None for all. The whole model is always added.
        start: the first position, 1 or more.
        top: number of tokens to keep of each prediction.
        capacity: of the KV cache during generation, on which some rotary embeddings depend.

    Raises:
        ValueError: the text is shorter than two tokens or longer than the context, or an exit is out
            of range.
    """
    n = len(token_ids)
    if n < 2:
        raise ValueError("the lens needs a text of two tokens or more: one to predict from another")
    if n - 1 > decoder.architecture.max_context:
        raise ValueError(
            f"the text has {n} tokens, this model's context holds"
            f" {decoder.architecture.max_context}; shorten the prompt or the answer"
        )
    assert 1 <= start < n
    exit_layers = _with_last_layer(exits, len(decoder.layers))
    # The prediction at a position comes from the state one before it; the last token has none.
    tokens = torch.tensor([list(token_ids[:-1])], device=decoder.device)
    pieces: dict[int, list[Tensor]] = {e: [] for e in exit_layers}
    for first, e, hidden in iter_exit_hidden_states(decoder, tokens, exit_layers, capacity):
        skipped = max(start - 1 - first, 0)
        if skipped < hidden.shape[1]:  # a copy, since a view would keep the whole chunk
            pieces[e].append(hidden[:, skipped:].clone())
    states = {e: torch.cat(pieces[e], dim=1) for e in exit_layers}
    answer = torch.cat(
        [decoder.logits(part).argmax(-1) for part in states[exit_layers[-1]].split(CHUNK, dim=1)],
        dim=1,
    )
    predictions = [_predictions(decoder, states[e], answer, top) for e in exit_layers]
    top_ids, top_probabilities, answer_probabilities = (
        torch.stack(parts).cpu() for parts in zip(*predictions, strict=True)
    )
    return Lens(
        token_ids=tuple(token_ids),
        prompt_tokens=prompt_tokens,
        exits=exit_layers,
        positions=range(start, n),
        top_ids=top_ids,
        top_probabilities=top_probabilities,
        answer_probabilities=answer_probabilities,
    )


def _predictions(
    decoder: Decoder, states: Tensor, answer: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens [P, k] of one exit, their probabilities [P, k], and those of the answer [P]."""
    top_ids, top_probabilities, answer_probabilities = [], [], []
    for part, answer_part in zip(
        states.split(CHUNK, dim=1), answer.split(CHUNK, dim=1), strict=True
    ):
        logits = decoder.logits(part)[0]
        p = logits.float().softmax(dim=-1)
        # Equal logits are frequent in bfloat16: the token that decoding takes has to come first.
        ranked = p.scatter(1, logits.argmax(-1, keepdim=True), float("inf"))
        best = ranked.topk(min(top, p.shape[-1]), dim=-1).indices
        top_ids.append(best)
        top_probabilities.append(p.gather(1, best))
        answer_probabilities.append(p.gather(1, answer_part[0, :, None])[:, 0])
    return torch.cat(top_ids), torch.cat(top_probabilities), torch.cat(answer_probabilities)


def _with_last_layer(exits: Collection[int] | None, n_layers: int) -> tuple[int, ...]:
    if exits is None:
        return tuple(range(1, n_layers + 1))
    for e in exits:
        if not 1 <= e <= n_layers:
            raise ValueError(f"exit layer {e} is out of range: this model has 1 to {n_layers}")
    return tuple(sorted({*exits, n_layers}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of the exits with the last layer, over the positions of answers; texts add up.

    Attributes:
        exits: X exit layers, ascending; the last is the whole model.
        prompts: number of texts.
        positions: number of positions, all texts together.
        agreeing: for each exit, number of positions where its top token is that of the last layer.
        saturating: for each exit, number of positions whose saturation layer it is.
    """

    exits: tuple[int, ...]
    prompts: int
    positions: int
    agreeing: tuple[int, ...]
    saturating: tuple[int, ...]

    @classmethod
    def of(cls, lens: Lens) -> "Agreement":
        """Count over the positions of the answer."""
        answer = lens.part(lens.answer_positions)
        return cls(
            exits=answer.exits,
            prompts=1,
            positions=len(answer.positions),
            agreeing=tuple(answer.agrees.sum(dim=1).tolist()),
            saturating=tuple(answer.saturation_layers.count(e) for e in answer.exits),
        )

    def __add__(self, other: "Agreement") -> "Agreement":
        assert self.exits == other.exits
        return Agreement(
            exits=self.exits,
            prompts=self.prompts + other.prompts,
            positions=self.positions + other.positions,
            agreeing=tuple(map(sum, zip(self.agreeing, other.agreeing, strict=True))),
            saturating=tuple(map(sum, zip(self.saturating, other.saturating, strict=True))),
        )

    @property
    def rates(self) -> list[float]:
        """Fraction of positions where the exit agrees with the last layer, for each exit."""
        return [n / self.positions for n in self.agreeing]

    @property
    def rate_of(self) -> dict[int, float]:
        """The rates by exit layer."""
        return dict(zip(self.exits, self.rates, strict=True))

    @property
    def saturated_by(self) -> list[float]:
        """Fraction of positions whose saturation layer is the exit or an earlier one, for each exit."""
        return [n / self.positions for n in itertools.accumulate(self.saturating)]

    @property
    def mean_saturation_layer(self) -> float:
        """The mean saturation layer."""
        return sum(e * n for e, n in zip(self.exits, self.saturating, strict=True)) / self.positions

    @property
    def settled_by(self) -> list[float]:
        """Deprecated name of `saturated_by`."""
        return self.saturated_by

    @property
    def mean_settled_layer(self) -> float:
        """Deprecated name of `mean_saturation_layer`."""
        return self.mean_saturation_layer

    def to_dict(self) -> dict[str, Any]:
        """Return the totals and an entry for each layer, for JSON ("settled": deprecated names)."""
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "mean_saturation_layer": self.mean_saturation_layer,
            "mean_settled_layer": self.mean_saturation_layer,
            "layers": [
                {
                    "exit_layer": e,
                    "agreement": rate,
                    "saturated_by": saturated,
                    "settled_by": saturated,
                }
                for e, rate, saturated in zip(
                    self.exits, self.rates, self.saturated_by, strict=True
                )
            ],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One draft and its verification.

    Attributes:
        position: of its first token in the text, prompt included.
        accepted: accepted draft tokens.
        rejected: rejected draft tokens; verification corrected the first of them.
        own: the model's own token after the accepted ones, in place of the first rejected one if there
            is one; None if the answer ends inside the draft.
    """

    position: int
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    own: int | None

    @property
    def corrected(self) -> bool:
        """True if the model's own token replaced a draft token."""
        return bool(self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {**dataclasses.asdict(self), "corrected": self.corrected}


def rounds(steps: Iterable[Step], prompt_tokens: int) -> Iterator[Round]:
    """Yield the rounds of an answer: all steps but the first, which is the prompt's pass.

    Args:
        steps: of a `Generation` in mode self-speculative.
        prompt_tokens: number of tokens of the prompt.
    """
    position = prompt_tokens
    for i, step in enumerate(steps):
        if i > 0:
            model_tokens = step.tokens[step.accepted :]
            yield Round(
                position=position,
                accepted=step.tokens[: step.accepted],
                rejected=step.rejected,
                own=model_tokens[0] if model_tokens else None,
            )
        position += len(step.tokens)
