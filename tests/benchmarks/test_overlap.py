"""Test rows that are also trained on, counted by hand."""

from overlap import begun, shared


def test_texts_that_both_have():
    asked, known = ["a b", "A  b", "c", "c"], ["a b", "d"]
    assert shared(asked, known) == 1
    assert shared(asked, known, lambda text: " ".join(text.lower().split())) == 2


def test_one_begins_with_the_other():
    known = ["abc", "xyz"]
    assert begun(["abc", "abcd", "ab", "x", "bc", "yz", "xyz!", ""], known) == 6
