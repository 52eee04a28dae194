"""Words and phrases of the extraction rows in three languages, from `extraction_words.json`.

Every fifth of a list of values, and of the phrases that make a message an order, an appointment, contact
details or an expense, is held out. Values are many, so that a model learns to copy them and not a list.
Most of their first words are the same tokens after a space, in the message, and after a quotation mark,
in the JSON: a small model copies them after minutes of training, and misspells others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Language:
    """Phrases and values of one language.

    Attributes:
        code: of ISO 639.
        phrases: of each kind of message, and of each further field. {} marks a value.
        labels: of a terse message's fields, such as "Item: glass tables".
        items: lists of first and, in English, second words of each kind of message that has any.
        months: from January.
        numbers: words for 2 to 6.
        dates: forms of a date; `month` is a word, `day` and `number` are without leading zeros.
        times: forms of a time of day; those with `hour12` are for languages that use am and pm.
        amounts: forms of an amount of money.
        greetings: before the message.
        asides: sentences that hold no field.
    """

    code: str
    phrases: Mapping[str, Sequence[str]]
    labels: Mapping[str, Sequence[str]]
    items: Mapping[str, Sequence[Sequence[str]]]
    months: Sequence[str]
    numbers: Sequence[str]
    dates: Sequence[str]
    times: Sequence[str]
    amounts: Sequence[str]
    greetings: Sequence[str]
    asides: Sequence[str]


_WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
LANGUAGES = tuple(Language(**language) for language in _WORDS["languages"])
NAMES: Sequence[str] = _WORDS["names"]
PLACES: Sequence[str] = _WORDS["places"]
MAIL_USERS: Sequence[str] = _WORDS["mail_users"]
MAIL_DOMAINS: Sequence[str] = _WORDS["mail_domains"]
CURRENCIES = {"EUR": "€", "USD": "$", "GBP": "£"}
