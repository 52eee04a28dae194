"""Rows of functions: head and body."""

import ast

import pytest

from layerskip.cli import demo_train as demo_functions
from layerskip.training.python_functions import standard_library

SOURCE = (
    '''
class A:
    @property
    def size(self):
        """How many there are.

        Zero is possible.
        """
        count = len(self.items)
        # a comment
        return count

    def silent(self):
        return 1 + 2 + 3 + 4 + 5

def only_words():
    """Nothing after these."""

def in_a_line(): """Here."""; return 12345678901234567890

def outer(x):
    """Has another one within."""
    def inner(y):
        """Adds."""
        return x + y + x + y
    return inner(1)

def long():
    """Long."""
    return "'''
    + "x" * 400
    + '''"

def text(self):
    """Speaks."""
    return """
no indentation
"""
'''
)


@pytest.fixture
def found(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(SOURCE)  # each head counts once
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xff\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('def f():\n    """A."""\n    return "a long text"\n')
    return {one.prompt.split("(")[0]: one for one in demo_functions.read_functions(tmp_path)}


def test_short_functions_with_docstring_and_body(found):
    assert set(found) == {"def size", "def outer", "def text"}
    assert {one.file.name for one in found.values()} == {"a.py"}


def test_head_and_body_make_the_function_again(found):
    for one in found.values():
        ast.parse(one.prompt + one.completion)
        assert one.completion.startswith("\n    ")
    size = found["def size"]
    assert size.prompt.startswith('def size(self):\n    """How many there are.\n\n    Zero')
    assert size.prompt.endswith('"""')
    assert size.completion == "\n    count = len(self.items)\n    # a comment\n    return count"
    assert found["def text"].completion == '\n    return """\nno indentation\n"""'


def test_nothing_held_out_comes_from_a_file_that_is_trained_on():
    rows = [
        demo_functions.Row(file=f"{i // 3}.py", prompt=f"{i}", completion="") for i in range(18)
    ]
    train, held_out = demo_functions.split(rows, 2)
    assert (len(train), len(held_out)) == (12, 2)
    assert not {one.file for one in train} & {one.file for one in held_out}
    assert demo_functions.split(rows, 2) == (train, held_out)
    with pytest.raises(ValueError, match="in 6 files only"):
        demo_functions.split(rows, 6)


def test_this_python_has_such_functions():
    assert len(demo_functions.read_functions(standard_library() / "email")) > 10
