"""What the scripts say of the machine and of the decoder."""

import torch
from engine import environment


def test_weights_and_threads_are_those_of_the_decoder(monkeypatch):
    monkeypatch.setattr("layerskip.model.native.build.num_threads_to_use", lambda: 77)
    found = environment("benchmarks/x.py", "bfloat16", "compiled", weights="int8")
    assert (found["kernels"], found["weights"], found["threads"]) == ("compiled", "int8", 77)
    assert found["command"].startswith("python benchmarks/x.py")
    assert isinstance(found["commit"], str)
    several = environment("benchmarks/x.py", "bfloat16")
    assert (several["kernels"], several["threads"]) == (None, torch.get_num_threads())
