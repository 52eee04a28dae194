"""Pictures of a report and of agreement, as PNG."""

import dataclasses
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from layerskip.decoding import Generation, LayerSkipModel
from layerskip.figures import new_figure, png
from layerskip.lens.lens import Agreement, Lens, Round, Symbols, look, rounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A prompt and its answer, what every layer would have said, and the rounds that it took.

    Attributes:
        model: the model's name.
        lens: what every layer would have said, at all positions looked at.
        agreement: over the positions of the answer.
        symbols: what to write for a token.
        generation: how the answer came about; None where it was given.
        rounds: empty unless the answer is self-speculative.
    """

    model: str
    lens: Lens
    agreement: Agreement
    symbols: Symbols
    generation: Generation | None
    rounds: tuple[Round, ...]

    @property
    def drafters(self) -> str:
        """Who drafted, in words; empty where nobody did."""
        assert self.generation is not None
        drafting = [step for step in self.generation.steps if step.drafted]
        exit_layer = self.generation.exit_layer
        names = {
            f"layers 1 to {exit_layer}": any(step.from_exit for step in drafting),
            "n-grams": any(step.drafted > step.from_exit for step in drafting),
        }
        return " and ".join(name for name, drafted in names.items() if drafted)

    def part(self, positions: range) -> "Report":
        """The report on some positions; see `Lens.part`. Agreement stays that of the whole answer."""
        return dataclasses.replace(self, lens=self.lens.part(positions))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        lens = self.lens
        return {
            "model": self.model,
            "token_ids": list(lens.token_ids),
            "prompt_tokens": lens.prompt_tokens,
            "generation": None if self.generation is None else self.generation.to_dict(),
            "rounds": [one.to_dict() for one in self.rounds],
            "agreement": self.agreement.to_dict(),
            "positions": [
                {
                    "position": position,
                    "token_id": lens.token_ids[position],
                    "symbol": self.symbols[lens.token_ids[position]],
                    "in_answer": position >= lens.prompt_tokens,
                    "settled_layer": settled,
                    "layers": [self._said(row, column) for row in range(len(lens.exits))],
                }
                for column, (position, settled) in enumerate(
                    zip(lens.positions, lens.settled, strict=True)
                )
            ],
        }

    def _said(self, row: int, column: int) -> dict[str, Any]:
        lens = self.lens
        return {
            "exit_layer": lens.exits[row],
            "agrees": bool(lens.agrees[row, column]),
            "answer_probability": float(lens.answer_probabilities[row, column]),
            "top": [
                {"token_id": token, "symbol": self.symbols[token], "probability": p}
                for token, p in lens.best(row, column)
            ],
        }


def report_on(
    model: LayerSkipModel,
    name: str,
    prompt: list[int],
    answer: Generation | list[int],
    *,
    exits: Collection[int] | None = None,
    start: int = 1,
    capacity: int | None = None,
) -> Report:
    """Look at an answer through a model's layers.

    Args:
        model: the model.
        name: what to call it.
        prompt: token ids.
        answer: made by the model, or any token ids, at least one.
        exits: see `look`.
        start: see `look`; not beyond the first token of the answer.
        capacity: see `look`.

    Raises:
        ValueError: the answer is empty; or see `look`.
    """
    generation = answer if isinstance(answer, Generation) else None
    new = answer.token_ids if isinstance(answer, Generation) else answer
    if not new:
        raise ValueError("the answer is empty; the lens needs at least one token of it")
    how: dict[str, Any] = {"exits": exits, "start": start, "capacity": capacity}
    lens = look(model.decoder, [*prompt, *new], prompt_tokens=len(prompt), **how)
    speculative = generation is not None and generation.rounds > 0
    return Report(
        model=name,
        lens=lens,
        agreement=Agreement.of(lens),
        symbols=Symbols(model.tokenizer),
        generation=generation,
        rounds=tuple(rounds(generation.steps, len(prompt)) if speculative and generation else ()),
    )


if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGREES, DIFFERS = "#58b9aa", "#e9ac72"  # the page's colours, at their strongest
LONGEST = 9  # characters of a token in a cell


def draw_report(report: Report) -> bytes:
    """A table of what each layer says at each position of `report.lens`, coloured by probability."""
    from matplotlib.colors import LinearSegmentedColormap

    lens = report.lens
    n_rows, n_columns = len(lens.exits), len(lens.positions)
    figure = new_figure(2.2 + 0.82 * n_columns, 1.6 + 0.25 * n_rows)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=[n_columns, 1.6])
    agrees, settled = lens.agrees, lens.settled
    for tone, shown in ((AGREES, agrees), (DIFFERS, ~agrees)):
        p = lens.top_probabilities[:, :, 0].clone()
        p[~shown] = float("nan")
        scale = LinearSegmentedColormap.from_list(tone, ["white", tone])
        axes.pcolormesh(p.numpy(), cmap=scale, vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    for row in range(n_rows):
        for column in range(n_columns):
            axes.text(
                column + 0.5,
                row + 0.5,
                _cut(report.symbols[int(lens.top_ids[row, column, 0])]),
                weight="bold" if agrees[row, column] else "normal",
                **_TEXT,
            )
    steps = [lens.exits.index(e) for e in settled]
    axes.stairs(steps, range(n_columns + 1), baseline=n_rows, color="black", linewidth=1.8)
    header = [_cut(report.symbols[lens.token_ids[position]]) for position in lens.positions]
    for column, (position, text) in enumerate(zip(lens.positions, header, strict=True)):
        drawn = _TEXT | {"fontsize": 8.5, "color": "black"}
        axes.text(column + 0.5, n_rows + 0.75, text, weight="bold", **drawn)
        axes.text(column + 0.5, n_rows + 1.6, str(position), **(_TEXT | {"color": "dimgray"}))
    if lens.prompt_tokens in lens.positions[1:]:
        axes.axvline(lens.prompt_tokens - lens.positions.start, color="tab:blue", linewidth=1.5)
    axes.set_yticks([row + 0.5 for row in range(n_rows)], [str(e) for e in lens.exits], fontsize=8)
    axes.set(ylabel="layer", xlim=(0, n_columns), ylim=(0, n_rows), xticks=[])
    rates = report.agreement.rate_of
    bars.barh([row + 0.5 for row in range(n_rows)], [rates[e] for e in lens.exits], color=AGREES)
    bars.set(xlim=(0, 1), xticks=[0, 1])
    bars.set_xticklabels(["0", "100%"], fontsize=8)
    bars.set_title("agreement", fontsize=9)
    for side in (axes, bars):
        side.tick_params(left=False)
        side.spines[:].set_visible(False)
    title = f"What every layer would have said: {report.model}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.supxlabel(
        "green: as the last layer, orange: another token, both by probability; black line: settled",
        fontsize=8,
    )
    return _png(figure)


def draw_agreement(agreement: Agreement, model: str) -> bytes:
    """Agreement, and what is settled, over the layers."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    axes.plot(agreement.exits, agreement.rates, "o-", color="#25a18e", label="agrees with the last")
    axes.plot(
        agreement.exits, agreement.settled_by, "s--", color="#3554a5", label="settled by then"
    )
    axes.set(xlabel="exit layer (layers run)", ylabel="share of answer tokens", ylim=(0, 1.03))
    axes.set_title(
        f"{model}: {agreement.prompts} prompts, {agreement.positions} tokens", parse_math=False
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


# Tokens are no formulas: `$` has to stay a dollar sign.
_TEXT = {"ha": "center", "va": "center", "fontsize": 7.5, "parse_math": False, "clip_on": False}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _png(figure: "Figure") -> bytes:
    figure.set_dpi(110)
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; no reason to alarm anybody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return png(figure)
