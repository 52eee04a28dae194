"""Commands that run in this process, on the tiny checkpoint."""

import importlib
import itertools

import pytest

from layerskip import cli


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Remove variables that make rich take a captured stream for a terminal, or for another one."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Hide a GPU, which every command would name."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def program(capsys):
    """Run the program in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        status = cli.run([*map(str, arguments)])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def run(program, folder):
    """The same, a command on the tiny checkpoint in float32, unless its flags say otherwise."""

    def call(command, *arguments):
        return program(command, "--model", folder, "--dtype", "float32", *arguments)

    return call


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the whole program in this process, streams included: (exit status, stderr)."""
    module = importlib.import_module("layerskip.cli.main")  # a function has that name too
    monkeypatch.setattr(module.Signals, "install", lambda self: None)
    monkeypatch.setattr(module.gc, "freeze", lambda: None)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*map(str, arguments)])
        return exit_.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def raise_at(monkeypatch):
    """Have the n-th call of a function or method raise: Ctrl-C, or whatever goes wrong."""

    def replace(owner, name, n, error):
        plain, numbers = getattr(owner, name), itertools.count(1)

        def counted(*arguments, **options):
            if next(numbers) == n:
                raise error
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    return replace
