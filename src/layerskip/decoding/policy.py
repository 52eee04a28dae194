"""Which way to decode: mode, exit layer and draft length, from what was asked and what is known."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.draft_length import BELIEF
from layerskip.model import CheckpointSettings, Decoder, StepCosts

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
    `draft_tokens` at most (in a batch all rows' at once), and none are made for a while where they do
    not pay. `draft_vocabulary`: the tokens that the early exit may draft, beside those of the prompt;
    None = all. `draft_text`: tokens of a text that is searched for n-grams beside prompt and answer, the
    file of its table, or None. `costs`: what was measured; None = costs are estimated from bytes.
    `trained`: whether the exit is the one that the checkpoint names.
    """

    mode: Mode
    exit_layer: int | None = None
    draft_tokens: int | None = None
    draft_from: DraftFrom = "early-exit"
    adaptive: bool = False
    draft_vocabulary: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)
    draft_text: Path | tuple[int, ...] | None = dataclasses.field(default=None, repr=False)
    costs: StepCosts | None = dataclasses.field(default=None, repr=False)
    trained: bool = dataclasses.field(default=False, repr=False, compare=False)

    def final_exit(self, n_layers: int) -> int:
        """The exit that has the last word on every token: E in early exit, else the last layer, L."""
        return self.exit_layer if self.mode == "early-exit" and self.exit_layer else n_layers

    @property
    def options(self) -> dict[str, Any]:
        """What `LayerSkipModel.answer` has to be told to decode so."""
        options: dict[str, Any] = {"mode": self.mode, "exit_layer": self.exit_layer}
        if self.mode == "self-speculative":
            options |= {
                "draft_tokens": self.draft_tokens,
                "draft_from": self.draft_from,
                "adaptive": self.adaptive,
                "draft_vocabulary": self.draft_vocabulary,
                "draft_text": self.draft_text,
            }
        return options


def choose(
    mode: str,
    exit_layer: int | None,
    draft_tokens: int | None,
    draft_from: str | None = None,
    adaptive: bool | None = None,
    draft_vocabulary: tuple[int, ...] | None = None,
    draft_text: Path | tuple[int, ...] | None = None,
    *,
    settings: CheckpointSettings,
    n_layers: int,
) -> Plan:
    """Settle on a plan.

    `auto` combines all that is there: drafts from n-grams, and from the early exit where the checkpoint
    or the caller names one, through the checkpoint's draft vocabulary, each draft as long as it is worth
    its cost. The caller may switch each part off or set it. In the other modes nothing is on that was
    not asked for; what is left open there comes from the checkpoint, else it is a quarter of the layers
    and 5 tokens.

    Args:
        mode: "auto" or one of `MODES`.
        exit_layer: E, or None.
        draft_tokens: d, the most where drafts are adaptive.
        draft_from: of `DRAFT_SOURCES`.
        adaptive: whether drafts decide their own length; None = in auto.
        draft_vocabulary: ids; () = all tokens; None = in auto the checkpoint's, else all.
        draft_text: ids, or a file (see `Datastore`); () = no text; None = in auto the checkpoint's, of
            which its file comes first, else none.
        settings: of the checkpoint.
        n_layers: L.

    Raises:
        ValueError: an unknown mode, a value out of range, or values that contradict each other.
    """
    check_options(
        mode, exit_layer, draft_tokens, draft_from, adaptive, draft_vocabulary, draft_text
    )
    if exit_layer is not None and not 1 <= exit_layer <= n_layers:
        raise ValueError(f"exit layer {exit_layer} is out of range: this model has 1 to {n_layers}")
    if mode == "plain":
        return Plan(mode="plain")
    known = exit_layer if exit_layer is not None else settings.exit_layer
    auto = mode == "auto"
    if draft_from is None:
        alone = auto and known is None and not draft_vocabulary
        draft_from = "n-gram" if alone else "both" if auto else "early-exit"
    if draft_from != "n-gram" and known is not None and known > n_layers:
        raise ValueError(
            f"the checkpoint's exit layer is {known}, but it has {n_layers} layers; name another"
        )
    exit_at = known if known is not None else max(1, n_layers // 4)
    if mode == "early-exit":
        return Plan(mode="early-exit", exit_layer=exit_at)
    adaptive = auto if adaptive is None else adaptive
    if draft_tokens is None:
        draft_tokens = settings.draft_tokens or DEFAULT_DRAFT_TOKENS
        if adaptive:
            draft_tokens = max(draft_tokens, MOST_DRAFT_TOKENS)
    if auto and draft_vocabulary is None and draft_from != "n-gram":
        draft_vocabulary = settings.draft_vocabulary
    if auto and draft_text is None and draft_from != "early-exit":
        draft_text = settings.draft_text_file or settings.draft_text
    return Plan(
        mode="self-speculative",
        exit_layer=None if draft_from == "n-gram" else exit_at,
        draft_tokens=draft_tokens,
        draft_from=cast(DraftFrom, draft_from),
        adaptive=adaptive,
        draft_vocabulary=draft_vocabulary or None,
        draft_text=draft_text or None,
        costs=settings.measured if adaptive else None,
        trained=draft_from != "n-gram" and exit_at == settings.exit_layer,
    )


def for_batch(
    plan: Plan, decoder: Decoder, settings: CheckpointSettings, contexts: Sequence[int]
) -> Plan:
    """What `auto` does for several prompts at once: early exits draft, or plain where that is best.

    Args:
        plan: what it does for one.
        decoder: whose costs count.
        settings: of the checkpoint.
        contexts: how many tokens each prompt has.
    """
    if plan.exit_layer is None:
        return Plan(mode="plain")
    share = len(plan.draft_vocabulary or ()) / decoder.architecture.vocab_size or 1.0
    costs = DraftCosts.of(decoder, plan.exit_layer, share, settings.measured, contexts)
    assert plan.draft_tokens is not None
    if not costs.batch_draft_tokens(len(contexts), plan.draft_tokens, BELIEF):
        return Plan(mode="plain")
    return dataclasses.replace(plan, draft_from="early-exit", draft_text=None)


def check_options(
    mode: str,
    exit_layer: int | None,
    draft_tokens: int | None,
    draft_from: str | None,
    adaptive: bool | None,
    draft_vocabulary: object,
    draft_text: object,
) -> None:
    """Refuse what no checkpoint can make sense of; arguments as of `choose`, but no model is needed.

    Of a draft vocabulary and a draft text it matters alone whether there is one.

    Raises:
        ValueError: an unknown mode or source of drafts, or values that contradict each other.
    """
    if mode not in ("auto", *MODES):
        raise ValueError(f"the mode {mode!r} is unknown; there are: auto, {', '.join(MODES)}")
    if draft_tokens is not None and draft_tokens < 0:
        raise ValueError(f"draft tokens is {draft_tokens}, it has to be 0 or above")
    if draft_from not in (None, *DRAFT_SOURCES):
        known_sources = ", ".join(DRAFT_SOURCES)
        raise ValueError(f"drafts from {draft_from!r} are unknown; there are: {known_sources}")
    drafting = bool(adaptive or draft_vocabulary or draft_text)
    drafting = drafting or not (draft_tokens is None is draft_from)
    if mode == "plain" and (exit_layer is not None or drafting):
        raise ValueError(
            "plain decoding drafts nothing; leave out the exit layer and all that is about drafts"
        )
    if mode == "early-exit" and drafting:
        raise ValueError("early exit drafts nothing; leave out all that is about drafts")
    if draft_from == "n-gram" and (exit_layer is not None or draft_vocabulary):
        raise ValueError(
            "drafts from n-grams have no exit layer or draft vocabulary; leave them out, or draft"
            " from both"
        )
    from_exit_alone = draft_from == "early-exit" or (draft_from is None and mode != "auto")
    if draft_text and from_exit_alone:
        raise ValueError("a draft text is searched for n-grams; draft from n-grams, or from both")
