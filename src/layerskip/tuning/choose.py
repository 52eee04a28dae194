"""The decision: the fastest confirmed setting, or plain decoding where no gain is certain."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What to decode with on this machine and these prompts.

    Attributes:
        mode: "auto" where drafts gain most as mode auto makes them, as long as they are worth it.
        exit_layer: None where no early exit is to draft, like draft_tokens: plain decoding, or mode
            auto with n-grams alone.
        tokens_per_s: measured.
        speedup: measured, over plain decoding of the same prompts in turns; 1 for plain itself.
        speedup_interval: 95% over the prompts.
        reason: one sentence for people.
    """

    mode: Literal["plain", "self-speculative", "auto"]
    exit_layer: int | None
    draft_tokens: int | None
    tokens_per_s: float
    speedup: float
    speedup_interval: list[float]
    reason: str

    @property
    def flags(self) -> str:
        """The same as flags of the command line, which cannot say what mode auto was told of costs."""
        if self.mode == "plain":
            return "--mode plain"
        if self.mode == "auto":
            alone = self.exit_layer is None
            return "--draft-from n-gram" if alone else f"--exit-layer {self.exit_layer}"
        pair = f"--exit-layer {self.exit_layer} --draft-tokens {self.draft_tokens}"
        return f"--mode {self.mode} {pair}"


def is_certain(row: Mapping[str, Any]) -> bool:
    """Whether a measured row is faster than plain decoding: the whole interval of its speedup is."""
    return bool(row["speedup_interval"][0] > 1.0)


def choose(rows: Sequence[Mapping[str, Any]]) -> Choice:
    """Choose from measured rows.

    The fastest of the settings whose speedup's interval is all above 1 is chosen; what may be slower
    than plain decoding is not worth having.

    Args:
        rows: as of `bench.rows.row`, plain decoding first, then at least one other.
    """
    plain, *others = rows
    fastest, gain = _fastest(others)
    pair = f"E={fastest['exit_layer']}, d={fastest['draft_tokens']}"
    if not is_certain(fastest):
        return Choice(
            mode="plain",
            exit_layer=None,
            draft_tokens=None,
            tokens_per_s=plain["tokens_per_s"],
            speedup=1.0,
            speedup_interval=[1.0, 1.0],
            reason=f"plain decoding is best here: the best of the pairs tried, {pair}, runs at {gain}",
        )
    return Choice(
        mode="self-speculative",
        exit_layer=fastest["exit_layer"],
        draft_tokens=fastest["draft_tokens"],
        tokens_per_s=fastest["tokens_per_s"],
        speedup=fastest["speedup"],
        speedup_interval=list(fastest["speedup_interval"]),
        reason=f"self-speculative decoding with {pair} is best here: {gain}",
    )


def choose_auto(
    pairs: Choice, rows: Sequence[Mapping[str, Any]], draft_tokens: Mapping[int, int]
) -> Choice:
    """Mode auto where it is certainly faster than plain decoding, and faster than the pair chosen.

    Args:
        pairs: what `choose` made of the pairs.
        rows: of mode auto, n-grams alone first, then with early exits.
        draft_tokens: the best draft length of each of these exits, for who drafts a fixed one.
    """
    fastest, gain = _fastest(rows)
    exit_layer = fastest["exit_layer"]
    if not is_certain(fastest) or fastest["speedup"] < pairs.speedup:
        # It is what runs unless told otherwise, so whoever reads this should know.
        auto = f"mode auto with {name_of_auto(exit_layer)} comes to {gain}"
        return dataclasses.replace(pairs, reason=f"{pairs.reason}; {auto}")
    fixed = (
        "drafts of a fixed length gain nothing for certain"
        if pairs.mode == "plain"
        else f"E={pairs.exit_layer} with d={pairs.draft_tokens} fixed comes to {pairs.speedup:.2f}x"
    )
    return Choice(
        mode="auto",
        exit_layer=exit_layer,
        draft_tokens=None if exit_layer is None else draft_tokens[exit_layer],
        tokens_per_s=fastest["tokens_per_s"],
        speedup=fastest["speedup"],
        speedup_interval=list(fastest["speedup_interval"]),
        reason=f"mode auto with {name_of_auto(exit_layer)} is best here: {gain}; {fixed}",
    )


def _fastest(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """The fastest of those that certainly gain, else of all, and its gain in words."""
    certain = [row for row in rows if is_certain(row)]
    row = max(certain or rows, key=lambda row: float(row["speedup"]))
    low, high = row["speedup_interval"]
    gain = f"{row['speedup']:.2f}x of plain decoding (95% interval {low:.2f} to {high:.2f})"
    return row, gain


def name_of_auto(exit_layer: int | None) -> str:
    """What mode auto drafts with."""
    return "n-grams" if exit_layer is None else f"E={exit_layer}"
