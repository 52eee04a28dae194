"""Rows of messages and JSON."""

import json
import re

import pytest

from layerskip.data import extraction_words as words
from layerskip.data.extraction import EXAMPLE, FIELDS, extraction_rows


@pytest.fixture(scope="module")
def rows():
    return extraction_rows(2000)


@pytest.fixture(scope="module")
def held_out():
    return extraction_rows(400, held_out=True)


def fields(rows, name):
    return {json.loads(row["completion"])[name] for row in rows} - {None}


def test_the_seed_decides_everything(rows):
    assert extraction_rows(50) == extraction_rows(50)
    assert extraction_rows(50) != extraction_rows(50, seed=1)
    assert extraction_rows(2000)[:50] == rows[:50]


def test_every_prompt_is_another_one_line(rows):
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].count("\n") == 1
        assert row["prompt"].endswith("\n")
        assert "{" not in row["prompt"]


def test_completions_have_the_fixed_fields_in_one_line(rows):
    for row in rows:
        assert list(json.loads(row["completion"])) == list(FIELDS)
        assert "\n" not in row["completion"]
    assert fields(rows, "kind") == {"order", "appointment", "contact", "expense"}


def test_texts_stand_in_the_message_as_they_are(rows):
    for row in rows:
        values = json.loads(row["completion"])
        for name in set(FIELDS) - {"kind", "quantity"}:
            assert values[name] is None or values[name] in row["prompt"], row


def test_quantities_are_numbers_where_the_message_has_a_word(rows):
    numbers = [set(same) for same in zip(*(lang.numbers for lang in words.LANGUAGES), strict=True)]
    quantities = set()
    for row in rows:
        quantity = json.loads(row["completion"])["quantity"]
        if quantity is not None and str(quantity) not in row["prompt"]:
            assert numbers[quantity - 2] & set(re.findall(r"\w+", row["prompt"])), row
            quantities.add(quantity)
    assert quantities == {2, 3, 4, 5, 6}


def test_held_out_names_items_and_places_are_in_no_other_row(rows, held_out):
    for name in ("item", "place", "name"):
        assert fields(held_out, name)
        assert not fields(held_out, name) & fields(rows, name)


def test_held_out_main_phrases_are_in_no_other_row(rows, held_out):
    phrases = [re.sub(r"{.*", "", phrase) for phrase in words.LANGUAGES[0].phrases["appointment"]]
    for i, beginning in enumerate(phrases):
        if len(beginning) < 8:  # "The " stands elsewhere too
            continue
        for some, is_held_out in ((rows, False), (held_out, True)):
            stands = any(beginning in row["prompt"] for row in some)
            assert stands == ((i % 5 == 4) == is_held_out), beginning


@pytest.mark.parametrize("language", words.LANGUAGES, ids=lambda language: language.greetings[0])
def test_each_language_has_what_the_first_has(language):
    first = words.LANGUAGES[0]
    assert language.phrases.keys() == first.phrases.keys()
    assert language.labels.keys() == first.labels.keys()
    assert language.items.keys() == first.items.keys()
    assert (len(language.months), len(language.numbers)) == (12, 5)
    assert all(len(part) >= 5 for parts in language.items.values() for part in parts)
    for kind, phrases in language.phrases.items():
        assert len(phrases) == 10
        slots = [set(re.findall(r"{\w+}", phrase)) for phrase in phrases]
        assert all(slot == slots[0] for slot in slots), kind


def test_the_example_is_a_prompt():
    assert EXAMPLE.count("\n") == 1
    assert EXAMPLE.endswith("\n")
