"""Files of JSON."""

import json
import math

from layerskip.fileio import json_text


def test_numbers_that_are_none_are_null():
    value = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": True, "e": None}
    read = json.loads(json_text(value), parse_constant=lambda name: 1 / 0)
    assert read == {"a": [1.5, None, [None]], "b": {"c": None}, "d": True, "e": None}


def test_a_terminal_obeys_no_text():
    text = json_text({"é\x9b2J": "\x1b]\x7f"})
    assert text == '{\n  "é\\u009b2J": "\\u001b]\\u007f"\n}\n'
    assert json.loads(text) == {"é\x9b2J": "\x1b]\x7f"}
    assert json_text("é\x9b", ascii_only=True) == '"\\u00e9\\u009b"\n'
