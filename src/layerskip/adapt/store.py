"""States of the frozen model on disk: the newest rounds of data, so that they take bounded space."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from layerskip.adapt.teacher import TeacherSequence


def write_sequences(path: Path, sequences: Sequence[TeacherSequence]) -> None:
    """Write sequences into one file, atomically."""
    temporary = path.with_suffix(".partial")
    save_file(
        {
            "exit_states": torch.cat([s.exit_states for s in sequences]),
            "last_states": torch.cat([s.last_states for s in sequences]),
            "tokens": torch.tensor([t for s in sequences for t in s.tokens], dtype=torch.int32),
            "lengths": torch.tensor(
                [[len(s.tokens), s.prompt_length, len(s)] for s in sequences], dtype=torch.int32
            ),
        },
        temporary,
    )
    temporary.replace(path)


def read_sequences(path: Path) -> list[TeacherSequence]:
    """Read the sequences of a file; the states stay memory-mapped until they are used."""
    with safe_open(path, framework="pt") as file:
        lengths: list[list[int]] = file.get_tensor("lengths").tolist()
        tokens: list[int] = file.get_tensor("tokens").tolist()
        exit_states = file.get_tensor("exit_states").split([n for *_, n in lengths])
        last_states = file.get_tensor("last_states").split([n for *_, n in lengths])
    sequences, begin = [], 0
    for (n_tokens, prompt_length, _), exit_, last in zip(
        lengths, exit_states, last_states, strict=True
    ):
        sequences.append(
            TeacherSequence(
                tokens=tokens[begin : begin + n_tokens],
                prompt_length=prompt_length,
                exit_states=exit_,
                last_states=last,
            )
        )
        begin += n_tokens
    return sequences


class Store:
    """The rounds of data in a folder, numbered; the oldest are removed beyond a number of tokens."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._folder, self._max_tokens = folder, max_tokens
        folder.mkdir(parents=True, exist_ok=True)
        self._rounds = {int(p.stem): read_sequences(p) for p in folder.glob("*.safetensors")}

    def __contains__(self, number: int) -> bool:
        return number in self._rounds

    def add(self, number: int, sequences: Sequence[TeacherSequence]) -> None:
        """Write a round, and remove the oldest ones that there is no room for."""
        path = self._path(number)
        write_sequences(path, sequences)
        self._rounds[number] = read_sequences(path)
        while len(self._rounds) > 1 and sum(map(len, self.sequences())) > self._max_tokens:
            oldest = min(self._rounds)
            del self._rounds[oldest]
            self._path(oldest).unlink()

    def sequences(self) -> Iterator[TeacherSequence]:
        """Iterate over all sequences, the oldest first."""
        for number in sorted(self._rounds):
            yield from self._rounds[number]

    def tokens_of(self, number: int) -> int:
        """Return the number of positions of a round."""
        return sum(map(len, self._rounds[number]))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"
