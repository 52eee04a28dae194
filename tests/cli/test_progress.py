import io

import pytest

from layerskip.cli.output import bars, track, waiting

TERMINAL_OR_NOT = pytest.mark.parametrize("is_terminal", [True, False])


def stderr(monkeypatch, is_terminal):
    """Return the captured stderr."""
    written = io.StringIO()
    written.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    return written


@TERMINAL_OR_NOT
def test_a_bar_is_for_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    with bars() as report:
        report("perplexity of notes[draft].txt", 1, 4)
    shown = written.getvalue()
    assert all(word in shown for word in ("notes[draft].txt", "1/4")) if is_terminal else not shown


@TERMINAL_OR_NOT
def test_things_are_counted_on_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    assert list(track([1, 2, 3], "prompts")) == [1, 2, 3]
    assert ("prompts" in written.getvalue()) == is_terminal


@TERMINAL_OR_NOT
def test_waiting_is_said_on_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    with waiting("loading a[b]"):
        pass
    assert ("loading a[b]" in written.getvalue()) == is_terminal
    written.seek(0)
    written.truncate()
    with waiting("loading", is_shown=False):
        pass
    assert not written.getvalue()
