"""Peak memory: what was needed since the mark was set back."""

import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import layerskip
from layerskip.bench.machine import PeakMemory, commit, environment
from layerskip.model import hardware

MIB = 2**20


def test_a_row_does_not_see_the_row_before():
    memory = PeakMemory(torch.device("cpu"))
    if memory.scope != "row":
        pytest.skip(f"here the mark only rises ({memory.scope})")
    before = memory.read()
    with mmap.mmap(-1, 64 * MIB) as pages:  # not malloc's, which may have so much at hand
        np.frombuffer(pages, dtype=np.uint8)[:] = 1
    after = memory.read()
    assert after - before > 32 * MIB
    memory.reset()
    assert memory.read() < after - 32 * MIB


def test_where_the_mark_cannot_be_reset_it_is_the_process(monkeypatch):
    monkeypatch.setattr(PeakMemory, "_reset_mark", staticmethod(lambda: False))
    memory = PeakMemory(torch.device("cpu"))
    assert memory.scope == "process"
    memory.reset()
    assert memory.read() > MIB


def test_environment_says_what_figures_depend_on():
    found = environment(dtype=torch.bfloat16, packages=["numpy", "no-such-package"])
    assert found["dtype"] == "bfloat16"
    assert found["threads"] == torch.get_num_threads()
    assert (found["torch"], found["numpy"]) == (torch.__version__, np.__version__)
    assert found["no-such-package"] is None
    assert found["cpus"] >= 1
    assert found["memory_bytes"] is None or found["memory_bytes"] > 100 * MIB


@pytest.mark.parametrize("model", ["family 25, model 17, stepping 1", ""])
def test_environment_tells_processors_of_one_name_apart(model, monkeypatch):
    module = sys.modules[environment.__module__]
    monkeypatch.setattr(module, "cpu_name", lambda: "AMD EPYC")
    monkeypatch.setattr(module, "cpu_model", lambda: model)
    found = environment(dtype=torch.bfloat16)
    assert (found["cpu"], found.get("cpu_model", "")) == ("AMD EPYC", model)
    assert ("cpu_model" in found) == bool(model)


def test_environment_names_the_vector_instructions(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_instructions", lambda: "fpu avx2 avx512_bf16 sse avx512f")
    assert environment(dtype=torch.bfloat16)["cpu_flags"] == "avx2 avx512f avx512_bf16"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_our_own_checkout(monkeypatch, tmp_path):
    def found(root, name):
        package = root / "src" / "layerskip"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (root / "pyproject.toml").write_text(f'name = "{name}"')
        monkeypatch.setattr(layerskip, "__file__", str(package / "__init__.py"))
        commit.cache_clear()
        return commit()

    def git(*words):
        author = (
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@example.org",
            "-c",
            "commit.gpgsign=false",
        )
        command = ["git", "-C", tmp_path, *author, *words]
        # In a hook GIT_DIR names the repository that is committed to, and this would go there.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        assert found(tmp_path, "layerskip") == ""  # no checkout
        git("init")
        assert found(tmp_path, "layerskip") == ""  # without a commit
        git("add", ".")
        git("commit", "--message", "first")
        head = git("rev-parse", "--short", "HEAD")
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
        assert found(tmp_path, "layerskip") == head
        assert environment(dtype=torch.float32)["commit"] == head
        (tmp_path / "src" / "layerskip" / "__init__.py").write_text("x = 1")
        assert found(tmp_path, "layerskip") == f"{head}+"
        assert found(tmp_path, "somebody-elses") == ""
        assert "commit" not in environment(dtype=torch.float32)
        monkeypatch.setenv("PATH", "")
        assert found(tmp_path, "layerskip") == ""
    finally:
        commit.cache_clear()
