"""What flags take: lists of layers, numbers, texts of files; and what goes together."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import click

from layerskip.decoding.placement import device_of
from layerskip.decoding.policy import check_options
from layerskip.model.files.settings import DRAFT_TEXT_FILE

_DRAFT_TEXT_FILE = "layerskip.draft_text_file"


def check_decoding(flags: dict[str, Any]) -> None:
    """Refuse flags of decoding that contradict each other whatever the model is, before it is loaded."""
    names = inspect.signature(check_options).parameters
    given: dict[str, Any] = {name: flags.get(name) for name in names}
    try:
        check_options(**given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """A callback that reads layers such as 4,8,12-20; ascending, each once."""
    if value is None:
        return None
    found: set[int] = set()
    for part in value.split(","):
        first, last = span(part)
        if not 1 <= first <= last:
            raise click.BadParameter(f"{value!r} is no list of layers; an example: 4,8,10-12")
        found |= set(range(first, last + 1))
    return sorted(found)


def span(text: str) -> tuple[int, int]:
    """First and last of "4" or "12-20"; (1, 0), which is empty, of anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", text)
    return (int(match[1]), int(match[2] or match[1])) if match else (1, 0)


def vocabulary_size(ctx: click.Context, param: click.Parameter, text: Any) -> int | None:
    """A number of tokens; 0 for "none", which draws no line."""
    if text is None or text == "none":
        return None if text is None else 0
    return int(click.IntRange(min=1).convert(text, param, ctx))


def draft_text(ctx: click.Context, param: click.Parameter, name: Any) -> str | Path | None:
    """The text of a file, which `draft_text_file` names later; the file, where it is of `index`; ""
    for "none"."""
    if name is None or name == "none":
        return None if name is None else ""
    ctx.meta[_DRAFT_TEXT_FILE] = name
    if Path(name).suffix == Path(DRAFT_TEXT_FILE).suffix:
        return Path(name)
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{name} cannot be read: {error}") from error


def draft_text_file() -> str | None:
    """The file that --draft-text named, which no output is to replace."""
    return click.get_current_context().meta.get(_DRAFT_TEXT_FILE)


def device(_: click.Context, __: click.Parameter, name: str) -> str:
    """A callback that refuses the name of a device that is not here."""
    try:
        device_of(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return name


def stop_texts(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """A callback that refuses an empty text, with which every answer would end at once."""
    if "" in texts:
        raise click.BadParameter("an empty text stops nothing")
    return texts


def json_object(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    """A callback that reads names and values from JSON."""
    try:
        found = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"no JSON: {error}") from error
    if text is not None and not isinstance(found, dict):
        raise click.BadParameter(f'{text} has no names; an example: {{"enable_thinking": false}}')
    return found


SEED = click.IntRange(-(2**63), 2**64 - 1)  # what PyTorch takes


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """See `click.ParamType`."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number that can be used", param, ctx)
        return number
