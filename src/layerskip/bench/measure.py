"""Interleaved measurement of systems and settings on the same prompts."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from layerskip.decoding import DecodingConfig, Step

WARM_UP_TOKENS = 16
SWITCH_S = 0.05  # idle threads of OpenMP spin for some milliseconds before they sleep


class SystemFailedError(Exception):
    """A system cannot answer; its row has the reason, and the other rows continue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of the result: a way to decode, and its name.

    Attributes:
        config: options of decoding; resolved, for this package's own rows.
        mode: name of the row, by default the config's mode; "auto" where that was asked for, or a mode
            of a baseline, such as "prompt-lookup".
        label: describes a row that differs from others of its mode in several options.
    """

    config: DecodingConfig = dataclasses.field(default_factory=lambda: DecodingConfig(mode="plain"))
    mode: str = ""
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", self.mode or self.config.reported_mode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One timed answer.

    Attributes:
        steps: the first one includes the prompt's pass, each other one is a pass or a round.
            `Step.drafted` is 0 where a system does not report it.
        text: the answer, without special tokens and stop string.
        ttft_s: seconds to the end of the first step.
        decode_s: seconds from there to the last token.
        weight_bytes_read: bytes of weights that the steps after the first had to read; None = unknown.
        peak_memory_bytes: see `PeakMemory`; None = unknown.
    """

    steps: tuple[Step, ...]
    text: str
    ttft_s: float
    decode_s: float
    weight_bytes_read: int | None = None
    peak_memory_bytes: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """All new tokens, up to and with the end token."""
        return [token for step in self.steps for token in step.tokens]

    @property
    def decoded_tokens(self) -> int:
        """Tokens after the first step: those that `decode_s` was spent on."""
        return sum(len(step.tokens) for step in self.steps[1:])


class System(Protocol):
    """A program that answers prompts, in one or several settings.

    Attributes:
        name: of its rows.
        settings: one for each row.
    """

    name: str
    settings: Sequence[Setting]

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """Continue a prompt.

        Raises:
            SystemFailedError: this system cannot; the others should continue.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """The measurement of one system in one setting.

    Attributes:
        runs: by prompt, then by repetition.
        error: reason why there are no complete runs, or None.
    """

    system: System
    setting: Setting
    runs: list[list[Run]]
    error: str | None = None


def measure(
    systems: Sequence[System],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
    partial: list[Entry] | None = None,
) -> list[Entry]:
    """Answer every prompt with every system in every setting.

    After a warm-up of each entry, all entries answer one prompt before the next prompt begins. Their
    order changes with the prompt and the repetition, so that each entry follows each other one about as
    often: drift of the machine, or an effect on the next entry, is the same for all.
    Before another system answers, the threads of the last one get the time to sleep.

    Args:
        systems: in the order of the result.
        prompts: token ids.
        max_new_tokens: 1 or more.
        repeats: number of passes over all prompts.
        progress: called after every answer with the number of answers so far, and in all.
        between: called before each repetition and after the last, outside of what is timed.
        partial: receives the entries of the prompts that all had answered where Ctrl-C or an error ends
            the measurement.

    Returns:
        One entry for each system and setting, in order.
    """
    entries = [Entry(system, setting, []) for system in systems for setting in system.settings]
    failures: dict[int, str] = {}
    measured: list[list[list[Run]]] = [[[] for _ in prompts] for _ in entries]
    done, total = 0, len(entries) * (1 + len(prompts) * repeats)

    def attempt(index: int, prompt: Sequence[int], n: int) -> Run | None:
        nonlocal done
        try:
            return entries[index].system.answer(entries[index].setting, prompt, n)
        except SystemFailedError as error:
            failures[index] = str(error)
            return None
        finally:
            done += 1
            progress(done, total)

    for index in range(len(entries)):
        attempt(index, prompts[0], min(WARM_UP_TOKENS, max_new_tokens))

    def result(answered: int) -> list[Entry]:
        return [
            dataclasses.replace(
                entry,
                runs=[] if index in failures else measured[index][:answered],
                error=failures.get(index),
            )
            for index, entry in enumerate(entries)
        ]

    last: System | None = None
    answered = 0  # number of prompts that all entries have answered
    try:
        for repetition in range(repeats):
            between()
            for at, prompt in enumerate(prompts):
                for index in _order(len(entries), at + repetition):
                    if index in failures:
                        continue
                    if last is not None and entries[index].system is not last:
                        time.sleep(SWITCH_S)
                    last = entries[index].system
                    if run := attempt(index, prompt, max_new_tokens):
                        measured[index][at].append(run)
                answered = max(answered, at + 1)
        between()
    except (KeyboardInterrupt, Exception):
        if partial is not None and answered:
            partial += result(answered)
        raise
    return result(len(prompts))


def _order(n: int, number: int) -> list[int]:
    """Return a row of a Williams design: over 2n rows each entry begins, and follows each other one,
    equally often. Neighbours differ by 1, -2, 3, -4, ..., then the same backwards.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    row = [(number + step) % n for step in zigzag]
    return row[::-1] if number // n % 2 else row
