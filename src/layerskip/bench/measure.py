"""Systems and settings side by side: the same prompts, taken in turns."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from layerskip.decoding import Step

WARM_UP_TOKENS = 16
SWITCH_S = 0.05  # threads that wait for work awake do so for some milliseconds


class SystemFailedError(Exception):
    """A system cannot give an answer; its row says why, and the other rows go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to decode; one row of the result.

    `mode` is one of `decoding.MODES`, "auto", or "prompt-lookup" (of peers). `exit_layer` and
    `draft_tokens` are those that are really used, and None where there are none; `draft_from` and
    `adaptive` are those of `decoding.Plan`; `draft_vocabulary` says how many tokens the early exit may
    draft, None means all. `label` says in words what is special about a row; `switches` are the
    arguments of `LayerSkipModel.answer` that make it so in mode auto.
    """

    mode: str
    exit_layer: int | None = None
    draft_tokens: int | None = None
    draft_from: str = "early-exit"
    adaptive: bool = False
    draft_vocabulary: int | None = None
    label: str | None = None
    switches: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One timed answer.

    Attributes:
        steps: tokens as they came; the first step includes the prompt's pass, each other one is a pass
            or a round. `Step.drafted` stays 0 where a system does not tell.
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
    """Something that answers prompts, in one or several settings.

    Attributes:
        name: of its rows.
        settings: those it takes part in.
    """

    name: str
    settings: Sequence[Setting]

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """Continue a prompt, greedily unless the system was told otherwise.

        Raises:
            SystemFailedError: this system cannot, and the others should go on.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One system in one setting and what was measured of it.

    Attributes:
        runs: by prompt, then by repetition.
        error: why there are no complete runs; None where all is well.
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
    so_far: list[Entry] | None = None,
) -> list[Entry]:
    """Answer every prompt with every system in every setting.

    After a warm-up of each, all entries take turns on one
    prompt before the next prompt begins, in an order that changes from prompt to prompt and from
    repetition to repetition, so that everybody follows everybody else about as often. So a machine that
    drifts, or one entry that suffers from its predecessor, hurts all alike. Where another system's turn
    comes, its predecessor's threads are given the time to fall asleep.

    Args:
        systems: who takes part.
        prompts: token ids.
        max_new_tokens: 1 or more.
        repeats: how often all prompts are gone through.
        progress: called after every answer, with how many there have been, and are if nothing fails.
        between: called before each repetition and after the last, outside of what is timed.
        so_far: where Ctrl-C or an error ends it, is filled with the entries of the prompts that all had
            answered.

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

    def found(answered: int) -> list[Entry]:
        return [
            dataclasses.replace(
                entry,
                runs=[] if index in failures else measured[index][:answered],
                error=failures.get(index),
            )
            for index, entry in enumerate(entries)
        ]

    last: System | None = None
    answered = 0  # prompts, by all
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
        if so_far is not None and answered:
            so_far += found(answered)
        raise
    return found(len(prompts))


def _order(n: int, turn: int) -> list[int]:
    """Who answers when: over 2n turns everybody begins, and follows each other one, equally often.

    Rows of a Williams design: neighbours differ by 1, -2, 3, -4, ..., then the same backwards.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    row = [(turn + step) % n for step in zigzag]
    return row[::-1] if turn // n % 2 else row
