"""The clock that decoding is timed by."""

from types import SimpleNamespace

import pytest
import torch

from layerskip.model import step_timing as clock


@pytest.mark.parametrize(("device", "waits"), [("cuda", ["this thread's stream"]), ("cpu", [])])
def test_the_clock_waits_for_the_device_before_it_reads(device, waits, monkeypatch):
    happened = []
    stream = SimpleNamespace(synchronize=lambda: happened.append("this thread's stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: happened.append("read") or 7.0)
    assert clock.device_clock(torch.device(device))() == 7.0
    # Not for the whole device, which may be capturing a CUDA graph.
    assert happened == [*waits, "read"]
