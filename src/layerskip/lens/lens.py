"""What every layer would have said: the shared exit applied between the layers of one pass."""

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
    """What to write for a token; `symbols[id]`."""

    def __init__(self, tokenizer: Any) -> None:
        """A tokenizer as transformers has it, or None: then a token is its number."""
        self._tokenizer = tokenizer
        self._symbol = functools.cache(self._make)

    def __getitem__(self, token_id: int) -> str:
        return self._symbol(token_id)

    def _make(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"#{token_id}"
        # Twice, less once: some tokenizers drop the space before the first token.
        once, twice = (self._decode([token_id] * n) for n in (1, 2))
        return visible(twice[len(once) :]) or f"#{token_id}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """The text with a sign in the place of every character that would not be seen.

    This covers what turns the direction of writing and what terminals obey.
    """
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


CHUNK = 64  # positions whose logits are in memory at once
TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lens:
    """What X exits would have said at P positions of a text.

    A column stands for the position of a token in the text and holds what each exit predicts there
    from the tokens before it; so the first position that can be looked at is 1.

    Attributes:
        token_ids: the text, prompt and answer.
        prompt_tokens: how many of them are the prompt.
        exits: X exit layers (layers run), ascending; the last is the whole model.
        positions: P neighbouring positions, each 1 to len(token_ids) - 1.
        top_ids: [X, P, k] int64, the most likely tokens, the best first.
        top_probabilities: [X, P, k] float32, theirs.
        answer_probabilities: [X, P] float32, what each exit gives to the last layer's top token.
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
        """[X, P] bool: the exit's top token is the last layer's."""
        top = self.top_ids[:, :, 0]
        return top == top[-1]

    @property
    def settled(self) -> list[int]:
        """For each position the earliest exit from which on every exit agrees with the last layer.

        Only the exits looked at count.
        """
        agreeing_from_above = self.agrees.flip(0).long().cumprod(0).sum(0)
        return [self.exits[-n] for n in agreeing_from_above.tolist()]

    def best(self, row: int, column: int) -> list[tuple[int, float]]:
        """The top tokens of an exit (by row) at a position (by column), and their probabilities."""
        ids, probabilities = self.top_ids[row, column], self.top_probabilities[row, column]
        return list(zip(ids.tolist(), probabilities.tolist(), strict=True))

    def part(self, positions: range) -> "Lens":
        """What of a range of positions was looked at.

        Raises:
            ValueError: none of these positions was looked at.
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
        """The positions looked at that belong to the answer."""
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
    """Look at a text through every layer, in one pass over it.

    Args:
        decoder: the model.
        token_ids: prompt and answer, 2 tokens or more.
        prompt_tokens: how many of them are the prompt.
        exits: exit layers to look at, each 1 to L; None for all. The whole model is always added.
        start: the first position to look at, 1 or more.
        top: how many tokens to keep of each prediction.
        capacity: of the cache that the answer was made with, which some rotary embeddings go by.

    Raises:
        ValueError: the text is shorter than two tokens or longer than the context, or an exit is none
            of this model's.
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
    wanted = _exits(exits, len(decoder.layers))
    # The prediction of a position comes from the state one before it; the last token predicts nothing.
    tokens = torch.tensor([list(token_ids[:-1])], device=decoder.device)
    pieces: dict[int, list[Tensor]] = {e: [] for e in wanted}
    for first, e, hidden in iter_exit_hidden_states(decoder, tokens, wanted, capacity):
        unseen = max(start - 1 - first, 0)
        if unseen < hidden.shape[1]:  # a copy, since a view would keep the whole chunk
            pieces[e].append(hidden[:, unseen:].clone())
    states = {e: torch.cat(pieces[e], dim=1) for e in wanted}
    answer = torch.cat(
        [decoder.logits(part).argmax(-1) for part in states[wanted[-1]].split(CHUNK, dim=1)], dim=1
    )
    found = [_read(decoder, states[e], answer, top) for e in wanted]
    top_ids, top_probabilities, answer_probabilities = (
        torch.stack(parts).cpu() for parts in zip(*found, strict=True)
    )
    return Lens(
        token_ids=tuple(token_ids),
        prompt_tokens=prompt_tokens,
        exits=wanted,
        positions=range(start, n),
        top_ids=top_ids,
        top_probabilities=top_probabilities,
        answer_probabilities=answer_probabilities,
    )


def _read(
    decoder: Decoder, states: Tensor, answer: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens [P, k], their probabilities [P, k], and those of the answer [P], of one exit."""
    ids, probabilities, of_answer = [], [], []
    for part, said in zip(states.split(CHUNK, dim=1), answer.split(CHUNK, dim=1), strict=True):
        logits = decoder.logits(part)[0]
        p = logits.float().softmax(dim=-1)
        # Among equal logits, frequent in 16 bits, decoding takes argmax's; so it has to come first.
        ranked = p.scatter(1, logits.argmax(-1, keepdim=True), float("inf"))
        best = ranked.topk(min(top, p.shape[-1]), dim=-1).indices
        ids.append(best)
        probabilities.append(p.gather(1, best))
        of_answer.append(p.gather(1, said[0, :, None])[:, 0])
    return torch.cat(ids), torch.cat(probabilities), torch.cat(of_answer)


def _exits(asked: Collection[int] | None, n_layers: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(range(1, n_layers + 1))
    for e in asked:
        if not 1 <= e <= n_layers:
            raise ValueError(f"exit layer {e} is out of range: this model has 1 to {n_layers}")
    return tuple(sorted({*asked, n_layers}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Counts over the positions of answers; those of several texts add up.

    Attributes:
        exits: X exit layers, ascending; the last is the whole model.
        prompts: how many texts were looked at.
        positions: how many positions, all texts together.
        agreeing: for each exit, positions where its top token is the last layer's.
        settling: for each exit, positions that it settles: from it on, and not before, every exit looked
            at agrees with the last layer.
    """

    exits: tuple[int, ...]
    prompts: int
    positions: int
    agreeing: tuple[int, ...]
    settling: tuple[int, ...]

    @classmethod
    def of(cls, lens: Lens) -> "Agreement":
        """Count over the positions of the answer that the lens looked at."""
        answer = lens.part(lens.answer_positions)
        return cls(
            exits=answer.exits,
            prompts=1,
            positions=len(answer.positions),
            agreeing=tuple(answer.agrees.sum(dim=1).tolist()),
            settling=tuple(answer.settled.count(e) for e in answer.exits),
        )

    def __add__(self, other: "Agreement") -> "Agreement":
        assert self.exits == other.exits
        return Agreement(
            exits=self.exits,
            prompts=self.prompts + other.prompts,
            positions=self.positions + other.positions,
            agreeing=tuple(map(sum, zip(self.agreeing, other.agreeing, strict=True))),
            settling=tuple(map(sum, zip(self.settling, other.settling, strict=True))),
        )

    @property
    def rates(self) -> list[float]:
        """Share of positions where the exit agrees with the last layer, for each exit."""
        return [n / self.positions for n in self.agreeing]

    @property
    def rate_of(self) -> dict[int, float]:
        """The same by exit."""
        return dict(zip(self.exits, self.rates, strict=True))

    @property
    def settled_by(self) -> list[float]:
        """Share of positions that are settled at the exit or before it, for each exit."""
        return [n / self.positions for n in itertools.accumulate(self.settling)]

    @property
    def mean_settled_layer(self) -> float:
        """The mean of the layers at which positions settle."""
        return sum(e * n for e, n in zip(self.exits, self.settling, strict=True)) / self.positions

    def to_dict(self) -> dict[str, Any]:
        """As JSON: totals, and an entry a layer."""
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "mean_settled_layer": self.mean_settled_layer,
            "layers": [
                {"exit_layer": e, "agreement": rate, "settled_by": settled}
                for e, rate, settled in zip(self.exits, self.rates, self.settled_by, strict=True)
            ],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One draft and its verification.

    Attributes:
        position: of its first token in the text, prompt included.
        accepted: drafted tokens that the model agreed with.
        rejected: the other drafted tokens; the first of them is the one that was corrected.
        own: the model's own token after the accepted ones, in the place of the first rejected one
            where there is one; None where the answer ends inside the draft.
    """

    position: int
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    own: int | None

    @property
    def corrected(self) -> bool:
        """Whether the model's own token replaced a drafted one."""
        return bool(self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "corrected": self.corrected}


def rounds(steps: Iterable[Step], prompt_tokens: int) -> Iterator[Round]:
    """The rounds of an answer; the first step, the prompt's own pass, is none.

    Args:
        steps: of a `Generation` in mode self-speculative.
        prompt_tokens: how many tokens the prompt has.
    """
    position = prompt_tokens
    for i, step in enumerate(steps):
        if i > 0:
            own = step.tokens[step.accepted :]
            yield Round(
                position=position,
                accepted=step.tokens[: step.accepted],
                rejected=step.rejected,
                own=own[0] if own else None,
            )
        position += len(step.tokens)
