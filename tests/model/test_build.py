"""Compiling and loading the kernels, and the number of their threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding.placement import KernelsWarning
from layerskip.model.native import NativeDecoder, NoCompilerError, build, prepare

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A machine that has compiled nothing yet; lists the commands that run."""
    target, real = tmp_path / "kernels" / "kernels.so", build.target()
    prepare()
    monkeypatch.setattr(build, "target", lambda: target)
    commands = []

    def run(command, **options):
        commands.append(command)
        if "failing" in command[0]:
            return subprocess.CompletedProcess(command, 1, "", "a warning\nx.cpp:1: error: no")
        shutil.copyfile(real, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", run)
    return commands


def test_compiled_once_and_announced_once(empty_cache):
    lines = []
    prepare(lines.append)
    prepare(lines.append)
    assert lines == ["compiling kernels for this machine (once)"]
    assert len(empty_cache) == 1


def test_a_damaged_library_is_compiled_again(empty_cache, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "kernels.so").write_bytes(b"truncated")
    prepare()
    assert len(empty_cache) == 1


def test_a_library_that_cannot_be_loaded(empty_cache, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda _, to: Path(to).write_bytes(b"another machine"))
    with pytest.raises(NoCompilerError, match="cannot be loaded"):
        prepare()


def test_the_error_of_a_failing_compiler_is_the_reason(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compiler", lambda: ("/failing/g++",))
    with pytest.raises(NoCompilerError, match=r"refuses: x\.cpp:1: error: no$"):
        prepare()
    assert not any((tmp_path / "kernels").iterdir())


def test_a_cache_that_cannot_be_written(empty_cache, monkeypatch, tmp_path):
    (tmp_path / "kernels").write_text("a file")
    with pytest.raises(NoCompilerError, match="the kernels cannot be written"):
        prepare()


def test_apples_compiler_uses_pytorchs_openmp(monkeypatch, tmp_path):
    find = build._compiler.__wrapped__
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(shutil, "which", {"clang++": "/usr/bin/clang++"}.get)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(NoCompilerError, match=r"no omp\.h in PyTorch; name another compiler"):
        find()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "omp.h").touch()
    program, *arguments = find()
    assert program == "/usr/bin/clang++"
    assert str(tmp_path / "include") in arguments
    assert "-lomp" not in arguments  # two OpenMP libraries in a process abort it
    monkeypatch.setenv("CXX", "clang++")  # as many shells have it
    assert find() == (program, *arguments)
    monkeypatch.setenv("CXX", "g++-15")
    assert find()[:2] == ("g++-15", "-fopenmp")


def test_cxx_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compiler", build._compiler.__wrapped__)
    for cxx, message in (
        ("g++ '-O2", "CXX is no command: No closing quotation"),
        ("'not there/g++'", "cannot be run"),
    ):
        monkeypatch.setenv("CXX", cxx)
        with pytest.raises(NoCompilerError, match=message):
            build._compile(tmp_path / "kernels.so")


def test_without_a_compiler_pytorch_runs_and_a_warning_reports_it(monkeypatch, tmp_path):
    def missing():
        raise NoCompilerError("there is no C++ compiler (g++ or clang++)")

    monkeypatch.setattr(build, "target", missing)
    tiny_models.build("llama2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler .*; install one, or load without"):
        LayerSkipModel.from_pretrained(tmp_path, compile=True)
    with pytest.warns(KernelsWarning, match=r"going on without .*, more slowly: there is no C\+\+"):
        model = LayerSkipModel.from_pretrained(tmp_path)
    assert not isinstance(model.decoder, NativeDecoder)


def test_no_compiler_has_fast_math_on(monkeypatch, tmp_path):
    """It would reorder sums. CXX is overruled, and the kernels refuse to be compiled with it."""
    command = [*build._compiler(), "-ffast-math", *build._FLAGS, str(build._SOURCE)]
    subprocess.run([*command, "-E", "-o", os.devnull], check=True)
    assert build._FLAGS.index("-fno-fast-math") < build._FLAGS.index("-ffp-contract=off")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-ffast-math"))
    with pytest.raises(NoCompilerError, match=r"refuses: .*error: .*fast-math is on"):
        build._compile(tmp_path / "kernels.so")


_FORK = """
import os, pathlib, sys, torch
from layerskip.model import load

torch.set_num_threads(2)
decoder = load(pathlib.Path(sys.argv[1]), dtype=torch.float32, compiled=True).decoder
def run():
    cache = decoder.new_cache(8)
    return decoder.run(decoder.embed(torch.tensor([[5, 6]])), 0, len(decoder.layers), cache)
expected = run()
child = os.fork()
if child == 0:
    same = torch.equal(run(), expected)
    torch.set_num_threads(2)  # without effect on the child's kernels
    os._exit(0 if same and torch.equal(run(), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_threads(tmp_path):
    tiny_models.build("llama2").save_pretrained(tmp_path)
    command = [sys.executable, "-c", _FORK, str(tmp_path)]
    assert subprocess.run(command, timeout=1800, check=False).returncode == 0


@pytest.mark.parametrize(
    ("files", "tiles", "expected"),
    [
        ({}, None, 8),
        ({}, 3, 3),
        ({}, 0, 1),
        ({"cpu.max": "max 100000"}, None, 8),
        ({"cpu.max": "250000 100000"}, None, 3),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, None, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8),
        # The group of a service is deeper; the lowest limit of its parents applies.
        ({"own": "0::/a/b.service", "a/b.service/cpu.max": "max 1", "a/cpu.max": "3 1"}, None, 3),
    ],
)
def test_threads_are_no_more_than_the_quota(files, tiles, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(build, "_CGROUPS", tmp_path)
    monkeypatch.setattr(build, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(build, "processors", lambda: 8)
    monkeypatch.setattr(build, "_quota", build._quota.__wrapped__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert build.num_threads_to_use(tiles) == expected


_THREADS = """
import os, torch
from layerskip.model.native import build

build._quota = lambda: 99
build.library()
torch.set_num_threads(2)
before = build.num_threads_to_use()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(before, build.num_threads_to_use())
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="of two processors"
)
@pytest.mark.parametrize("bind", ["", "true"])
def test_threads_are_no_more_than_the_processors_of_the_process(bind):
    """With threads bound to processors by OpenMP, the first thread sees only its own."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one processor")
    environment = {**os.environ, "OMP_PROC_BIND": bind or "false", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _THREADS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    before, after = done.stdout.split()
    assert before == "2"
    assert bind or after == "1"
