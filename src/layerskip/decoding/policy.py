"""Which way to decode: mode, exit layer and draft length, from what was asked and what is known."""

import dataclasses
from typing import Literal, get_args

from layerskip.model.checkpoint import Settings

Mode = Literal["plain", "early-exit", "self-speculative"]
MODES: tuple[Mode, ...] = get_args(Mode)
DraftFrom = Literal["early-exit", "n-gram", "both"]
DRAFT_SOURCES: tuple[DraftFrom, ...] = get_args(DraftFrom)
DEFAULT_DRAFT_TOKENS = 5
MOST_DRAFT_TOKENS = 12  # where the draft decides itself how far to go


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A decision that holds for one answer.

    `exit_layer` is None in plain mode, and where all drafts are n-grams; `draft_tokens` is None unless
    the mode is self-speculative. `adaptive`: drafts end where another token is not worth its cost,
    `draft_tokens` at most. `draft_vocabulary`: the tokens that the early exit may draft, beside those of
    the prompt; None = all.
    """

    mode: Mode
    exit_layer: int | None = None
    draft_tokens: int | None = None
    draft_from: DraftFrom = "early-exit"
    adaptive: bool = False
    draft_vocabulary: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)


def choose(
    mode: str,
    exit_layer: int | None,
    draft_tokens: int | None,
    draft_from: str | None = None,
    adaptive: bool = False,
    draft_vocabulary: tuple[int, ...] | None = None,
    *,
    settings: Settings,
    n_layers: int,
) -> Plan:
    """Settle on a plan.

    `auto` is self-speculative where the checkpoint or the caller names an exit layer, draft tokens or
    where drafts come from, else plain. What the caller leaves open comes from the checkpoint, else it is
    a quarter of the layers, 5 tokens, and drafts from the early exit.

    Raises:
        ValueError: an unknown mode, a value out of range, or values that contradict each other.
    """
    if mode not in ("auto", *MODES):
        raise ValueError(f"the mode {mode!r} is unknown; there are: auto, {', '.join(MODES)}")
    if exit_layer is not None and not 1 <= exit_layer <= n_layers:
        raise ValueError(f"exit layer {exit_layer} is out of range: this model has 1 to {n_layers}")
    if draft_tokens is not None and draft_tokens < 0:
        raise ValueError(f"draft tokens is {draft_tokens}, it has to be 0 or above")
    if draft_from not in (None, *DRAFT_SOURCES):
        known_sources = ", ".join(DRAFT_SOURCES)
        raise ValueError(f"drafts from {draft_from!r} are unknown; there are: {known_sources}")
    drafting = adaptive or any(
        given is not None for given in (draft_tokens, draft_from, draft_vocabulary)
    )
    if mode == "plain" and (exit_layer is not None or drafting):
        raise ValueError("plain decoding has no exit layer and no draft tokens; leave them out")
    if mode == "early-exit" and drafting:
        raise ValueError("early exit has no draft tokens; leave them out")
    if draft_from == "n-gram" and not (exit_layer is None and draft_vocabulary is None):
        raise ValueError(
            "drafts from n-grams have no exit layer or draft vocabulary; leave them out, or draft"
            " from both"
        )
    known = exit_layer if exit_layer is not None else settings.exit_layer
    if mode == "plain" or (mode == "auto" and known is None and not drafting):
        return Plan(mode="plain")
    if known is not None and known > n_layers:
        raise ValueError(
            f"the checkpoint's assistant_early_exit is {known}, but it has {n_layers} layers;"
            " name an exit layer"
        )
    exit_at = known if known is not None else max(1, n_layers // 4)
    if mode == "early-exit":
        return Plan(mode="early-exit", exit_layer=exit_at)
    if draft_tokens is None:
        draft_tokens = settings.draft_tokens or DEFAULT_DRAFT_TOKENS
        if adaptive:
            draft_tokens = max(draft_tokens, MOST_DRAFT_TOKENS)
    return Plan(
        mode="self-speculative",
        exit_layer=None if draft_from == "n-gram" else exit_at,
        draft_tokens=draft_tokens,
        draft_from=draft_from or "early-exit",
        adaptive=adaptive,
        draft_vocabulary=draft_vocabulary,
    )
