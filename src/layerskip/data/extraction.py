"""Rows of a narrow task: a short message to one line of JSON with fixed fields.

Messages are orders, appointments, contact details and expenses in three languages: as sentences in any
order or as terse lists, with typos and sentences that hold no field. Held-out rows have values (names,
items, places) and main phrases of which none is in other rows. Everything follows from the seed.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.data.extraction_words import (
    CURRENCIES,
    LANGUAGES,
    MAIL_DOMAINS,
    MAIL_USERS,
    NAMES,
    PLACES,
    Language,
)

FIELDS = ("kind", "name", "item", "quantity", "amount", "date", "time", "place", "contact")
EXAMPLE = "Hello, please send me two glass tables. The date is 14 March. Regards, Anna\n"
PROMPT_FORM = "one message, ending in a line break"
# Kind -> fields of its main phrase, and the probability of each further one.
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "order": (
        ("quantity", "item"),
        {"name": 0.4, "place": 0.35, "date": 0.3, "amount": 0.2, "contact": 0.2},
    ),
    "appointment": (
        ("item",),
        {"date": 0.8, "time": 0.7, "name": 0.3, "place": 0.25, "contact": 0.1},
    ),
    "contact": (("name", "contact"), {"place": 0.3, "time": 0.2}),
    "expense": (("item", "amount"), {"date": 0.5, "place": 0.3, "name": 0.25}),
}
_LANGUAGE_WEIGHTS = 2, 1, 1  # English, French, Spanish
_TERSE, _TYPOS, _GREETING, _ASIDE = 0.25, 0.05, 0.25, 0.2  # probabilities
_SEPARATORS = (". ", ". ", ", ", "; ", " - ")
_TERSE_SEPARATORS = (", ", "; ", " / ", " - ", " | ")


@dataclass(frozen=True)
class _Value:
    """A value as it stands in the message, and the fields that it fills in."""

    text: str
    fields: dict[str, Any]


def extraction_rows(n: int, *, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """Return different rows with `prompt` (the message and a line break) and `completion` (JSON).

    Args:
        n: number of rows.
        seed: of everything random.
        held_out: use the values and main phrases that no other row has.
    """
    writer = _Writer(random.Random(f"{seed} {held_out}"), held_out)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        message, fields = writer.message()
        completion = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        rows[message] = {"prompt": f"{message}\n", "completion": completion}
    return list(rows.values())


class _Writer:
    """Writes messages.

    Args:
        rng: random numbers.
        held_out: take every fifth of each list, and of the others none.
    """

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self._rng, self._held_out = rng, held_out

    def message(self) -> tuple[str, dict[str, Any]]:
        """Return a message and its fields."""
        rng = self._rng
        kind = rng.choice(list(_KINDS))
        (language,) = rng.choices(LANGUAGES, _LANGUAGE_WEIGHTS)
        main, further = _KINDS[kind]
        names = [*main, *(name for name, p in further.items() if rng.random() < p)]
        values = {name: self._value(name, kind, language) for name in names}
        fields: dict[str, Any] = dict.fromkeys(FIELDS)
        fields["kind"] = kind
        for value in values.values():
            fields |= value.fields
        write = self._terse if rng.random() < _TERSE else self._sentences
        return write(kind, language, values), fields

    def _sentences(self, kind: str, language: Language, values: dict[str, _Value]) -> str:
        """Write the main phrase and one for each further field, in any order."""
        rng = self._rng
        main = _KINDS[kind][0]
        texts = {name: value.text for name, value in values.items()}
        keys = [kind, *(_phrase_key(name) for name in values if name not in main)]
        rng.shuffle(keys)
        has_typos = rng.random() < _TYPOS
        parts = []
        for key in keys:
            phrases = language.phrases[key]
            phrase = self._of(phrases) if key == kind else rng.choice(phrases)
            parts.append((self._misspell(phrase) if has_typos else phrase).format(**texts))
        if rng.random() < _ASIDE:
            parts.insert(rng.randint(0, len(parts)), rng.choice(language.asides))
        separator = rng.choice(_SEPARATORS)
        text = separator.join(parts) + rng.choice((".", ".", ""))
        if rng.random() < _GREETING:
            text = f"{rng.choice(language.greetings)}{rng.choice((', ', '! ', ' '))}{text}"
        return text.replace("?.", "?").replace("..", ".")

    def _terse(self, kind: str, language: Language, values: dict[str, _Value]) -> str:
        """Write a list of fields: the kind, then labels and values in any order."""
        rng = self._rng
        names = list(values)
        rng.shuffle(names)
        labels = [rng.choice(language.labels[_phrase_key(name)]) for name in names]
        pairs = zip(labels, names, strict=True)
        parts = [f"{label}: {values[name].text}" for label, name in pairs]
        separator = self._of(_TERSE_SEPARATORS)
        return separator.join([rng.choice(language.labels[kind]), *parts])

    def _of(self, choices: Sequence[str]) -> str:
        return self._rng.choice(
            [choice for i, choice in enumerate(choices) if (i % 5 == 4) == self._held_out]
        )

    def _misspell(self, phrase: str) -> str:
        """Swap, drop or double a letter inside a word of the phrase, never in a value."""
        rng = self._rng
        words = list(re.finditer(r"(?<!\{)\b[^\W\d_]{5,}\b(?!\})", phrase))
        if not words:
            return phrase
        at = (word := rng.choice(words)).start() + rng.randint(1, len(word[0]) - 3)
        a, b = phrase[at], phrase[at + 1]
        return phrase[:at] + rng.choice((b + a, b, a + a + b)) + phrase[at + 2 :]

    def _value(self, name: str, kind: str, language: Language) -> _Value:
        if name == "item":
            text = " ".join(map(self._of, language.items[kind]))
        elif name == "place":
            text = self._of(PLACES)
        elif name == "name":
            text = self._of(NAMES)
        else:
            return getattr(self, f"_{name}")(language)
        return _Value(text, {name: text})

    def _contact(self, language: Language) -> _Value:
        """Return a mail address, or a telephone number of those that nobody has."""
        rng = self._rng
        if rng.random() < 0.6:
            text = f"{self._of(MAIL_USERS)}@{rng.choice(MAIL_DOMAINS)}"
            return _Value(text, {"contact": text})
        text = f"555-0{rng.randint(100, 199)}"
        return _Value(text, {"contact": text})

    def _quantity(self, language: Language) -> _Value:
        quantity = self._rng.randint(2, self._rng.choice((6, 40)))
        is_word = quantity <= 6 and self._rng.random() < 0.5
        text = language.numbers[quantity - 2] if is_word else str(quantity)
        return _Value(text, {"quantity": quantity})

    def _amount(self, language: Language) -> _Value:
        rng = self._rng
        code, sign = rng.choice(list(CURRENCIES.items()))
        text = rng.choice(language.amounts).format(number=rng.randint(3, 400), sign=sign, code=code)
        return _Value(text, {"amount": text})

    def _date(self, language: Language) -> _Value:
        rng = self._rng
        number, day = rng.randint(1, 12), rng.randint(1, 28)
        month = language.months[number - 1]
        text = rng.choice(language.dates).format(day=day, month=month, number=number)
        return _Value(text, {"date": text})

    def _time(self, language: Language) -> _Value:
        rng = self._rng
        hour, minute = rng.randint(7, 21), rng.choice((0, 15, 30, 45, 10, 20))
        half = "am" if hour < 12 else "pm"
        text = rng.choice(language.times).format(
            hour=hour, hour12=(hour - 1) % 12 + 1, minute=minute, half=half
        )
        return _Value(text, {"time": text})


def _phrase_key(name: str) -> str:
    """Return the key of a field's phrases: those of `contact` are of the kind of message."""
    return "contact detail" if name == "contact" else name
