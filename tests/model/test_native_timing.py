"""What more rows cost this machine is timed once, and read from the cache from then on."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layerskip.model import timing
from layerskip.model.native import timing as native_timing
from layerskip.model.native.timing import row_costs

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    """An empty cache and little to time; gives the file of a kind."""
    monkeypatch.setattr(native_timing, "target", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(native_timing, "BYTES", 1 << 16)
    monkeypatch.setattr(native_timing, "_BYTES_A_THREAD", 0)
    monkeypatch.setattr(timing, "_STEADY", float("inf"))  # so little takes any time
    monkeypatch.setattr(timing, "_known", {})
    return lambda kind: tmp_path / f"kernels.{kind}.1.json"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_timed_once_and_kept(kind, file_of, monkeypatch):
    costs = row_costs(kind)
    assert len(costs) == 16
    assert costs[0] == 1.0
    assert list(costs) == sorted(costs)
    assert json.loads(file_of(kind).read_text()) == list(costs)
    file_of(kind).write_text(json.dumps([1.0, *[9.0] * 15]))
    monkeypatch.setattr(timing, "_known", {})
    assert row_costs(kind) == (1.0, *[9.0] * 15)


def test_what_a_busy_machine_says_is_not_kept(file_of, monkeypatch):
    monkeypatch.setattr(timing, "_STEADY", 0.0)
    assert len(row_costs("float32")) == 16
    assert not file_of("float32").exists()


@pytest.mark.parametrize("damaged", ["", "{", "3", "[]", "[1.0, 9.0]", '["many"]'])
def test_a_damaged_file_is_made_again(damaged, file_of):
    file_of("float32").write_text(damaged)
    assert len(row_costs("float32")) == 16
    assert len(json.loads(file_of("float32").read_text())) == 16


def test_a_cache_that_cannot_be_written_is_no_matter(file_of):
    file_of("int8").mkdir()
    assert len(row_costs("int8")) == 16


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_timed_on_the_cpu_whatever_the_default_device_is(kind, file_of):
    with torch.device("meta"):
        assert len(row_costs(kind)) == 16


def test_two_threads_do_not_time_against_each_other(file_of, monkeypatch):
    timed, alone = timing._timed, threading.Lock()

    def slow(product, may_fall):
        assert alone.acquire(blocking=False)
        time.sleep(0.05)
        alone.release()
        return timed(product, may_fall)

    monkeypatch.setattr(timing, "_timed", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(row_costs, ["float32", "float32"])
    assert first is second
