import io

import pytest

from layerskip.cli.options import waiting
from layerskip.cli.progress import bars, track


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def stderr(request, monkeypatch):
    """What stderr becomes: (whether it is a terminal, what was written)."""
    written = io.StringIO()
    written.isatty = lambda: request.param
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    return request.param, written


def test_a_bar_is_for_terminals(stderr):
    is_terminal, written = stderr
    with bars() as report:
        report("perplexity of notes[draft].txt", 1, 4)
    shown = written.getvalue()
    assert all(word in shown for word in ("notes[draft].txt", "1/4")) if is_terminal else not shown


def test_things_are_counted_on_terminals(stderr):
    is_terminal, written = stderr
    assert list(track([1, 2, 3], "prompts")) == [1, 2, 3]
    assert ("prompts" in written.getvalue()) == is_terminal


def test_waiting_is_said_on_terminals(stderr):
    is_terminal, written = stderr
    with waiting("loading a[b]"):
        pass
    assert ("loading a[b]" in written.getvalue()) == is_terminal
    written.seek(0)
    written.truncate()
    with waiting("loading", is_shown=False):
        pass
    assert not written.getvalue()
