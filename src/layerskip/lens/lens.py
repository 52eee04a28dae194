"""What every layer would have said: the shared exit applied between the layers of one pass."""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from layerskip.decoding import walk_exits
from layerskip.model import Decoder

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
    for first, e, hidden in walk_exits(decoder, tokens, wanted, capacity):
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
