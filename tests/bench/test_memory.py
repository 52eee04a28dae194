"""Peak memory: what was needed since the mark was set back."""

import mmap

import numpy as np
import pytest
import torch

from layerskip.bench.environment import environment
from layerskip.bench.memory import PeakMemory

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


def test_where_the_mark_cannot_be_set_back_it_is_the_process(monkeypatch):
    monkeypatch.setattr(PeakMemory, "_set_back", staticmethod(lambda: False))
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
