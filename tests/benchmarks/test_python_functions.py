"""Functions of Python files as rows: head and body."""

import ast

import pytest
from paper.python_functions import functions

from layerskip.data.python_files import python_files

SOURCE = '''
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

def outer(x):
    """Has another one within."""
    def inner(y):
        """Adds."""
        return x + y + x + y
    return inner(1)

def text(self):
    """Speaks."""
    return """
no indentation
"""
'''


@pytest.fixture
def heads():
    return {f.lines[0].split("(")[0]: f for f in functions(SOURCE) if f.head is not None}


def test_functions_with_a_docstring_are_not_those_within_others(heads):
    assert set(heads) == {"def size", "def outer", "def text"}


def test_head_and_body_make_the_function_again(heads):
    for function in heads.values():
        prompt, completion = function.cut(function.head)
        ast.parse(prompt + completion)
        assert completion.startswith("\n    ")
    prompt, completion = heads["def size"].cut(heads["def size"].head)
    assert prompt.startswith('def size(self):\n    """How many there are.\n\n    Zero')
    assert prompt.endswith('"""')
    assert completion == "\n    count = len(self.items)\n    # a comment\n    return count"
    function = heads["def text"]
    assert function.cut(function.head)[1] == '\n    return """\nno indentation\n"""'


def test_tests_and_files_that_are_no_python_are_left_out(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xff\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('def f():\n    """A."""\n    return 1\n')
    files = python_files(tmp_path)
    assert [file.name for file in files] == ["a.py", "broken.py", "latin.py"]
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    assert [len(list(functions(text))) for text in texts] == [4, 0, 0]
