"""A report as one self-contained HTML page: no network, no fonts, no other file."""

import base64
import functools
import hashlib
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from layerskip.lens.lens import Agreement, Round
from layerskip.lens.report import Report


def report_page(report: Report) -> str:
    """Return the page of one text: the rounds, and the predictions of every layer.

    It shows all positions of `report.lens`; for fewer, pass `report.part(positions)`.
    """
    return _render("report.html", report=report, lens=_Grid(report), data=_data(report))


def agreement_page(agreement: Agreement, model: str) -> str:
    """Return the page of several prompts: agreement layer by layer."""
    return _render("agreement.html", agreement=agreement, model=model)


class _Grid:
    """The cells of the table, the last layer first."""

    def __init__(self, report: Report) -> None:
        lens = report.lens
        agrees, saturated = lens.agrees.tolist(), lens.saturation_layers
        origins = _origins(report.rounds)
        self.columns = [
            {
                "position": position,
                "symbol": report.symbols[lens.token_ids[position]],
                "saturated": saturated[column],
                "in_prompt": position < lens.prompt_tokens,
                "starts_answer": position == lens.prompt_tokens and column > 0,
                "origin": origins.get(position),
            }
            for column, position in enumerate(lens.positions)
        ]
        rates = report.agreement.rate_of
        self.rows = [
            {
                "exit": e,
                "agreement": rates[e],
                "cells": [
                    {
                        "symbol": report.symbols[int(lens.top_ids[row, column, 0])],
                        "percent": round(100 * float(lens.top_probabilities[row, column, 0])),
                        "agrees": agrees[row][column],
                        "saturates": saturated[column] == e,
                        # A vertical part of the line between saturated and other cells.
                        "left": column > 0
                        and (saturated[column - 1] <= e) != (saturated[column] <= e),
                    }
                    for column in range(len(lens.positions))
                ],
            }
            for row, e in reversed(list(enumerate(lens.exits)))
        ]


def _origins(rounds: tuple[Round, ...]) -> dict[int, str]:
    """Map the positions of rounds to the origin of their tokens."""
    origins: dict[int, str] = {}
    for round_ in rounds:
        end = round_.position + len(round_.accepted)
        origins |= dict.fromkeys(range(round_.position, end), "accepted")
        if round_.own is not None:
            origins[end] = "corrected" if round_.corrected else "own"
    return origins


def _data(report: Report) -> dict[str, Any]:
    """Data for the page's script: each symbol once, and (number of symbol, probability) of each cell."""
    lens = report.lens
    numbers = dict[int, int]()  # by token id, since different tokens can have the same symbol

    def number(token: int) -> int:
        return numbers.setdefault(token, len(numbers))

    cells = [
        [
            {
                "top": [[number(t), round(p, 4)] for t, p in lens.best(row, column)],
                "answer": round(float(lens.answer_probabilities[row, column]), 4),
            }
            for column in range(len(lens.positions))
        ]
        for row in reversed(range(len(lens.exits)))
    ]
    return {"cells": cells, "symbols": [report.symbols[token] for token in numbers]}


def _render(template: str, **variables: Any) -> str:
    script, style = (_template_text(name) for name in ("lens.js", "lens.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The digest lets the browser run this script only, and none that a token contains.
    return (
        _templates()
        .get_template(template)
        .render(script=Markup(script), style=Markup(style), script_digest=digest, **variables)
    )


def _template_text(name: str) -> str:
    return (files("layerskip.lens") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
