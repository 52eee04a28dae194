"""The number of threads of each pass: adapted to busy cores, and without effect on results."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import tiny_models
from layerskip import LayerSkipModel
from layerskip.model import load
from layerskip.model.native import native_decoder
from layerskip.model.native.team_size import MAX_RETRY_NS, TeamSize
from tiny_models import LAYERS

MS = 1_000_000


class Machine:
    """A clock that passes advance: with more threads than free cores, most of it is waiting."""

    def __init__(self, free_cores, maximum):
        self.now, self.times = 0, [0, 0]
        self.free_cores, self.maximum = free_cores, maximum
        self.team_size = TeamSize(self.times, lambda: self.now)

    def run(self, n_passes):
        """Return the number of threads of each pass."""
        return [self.run_pass(self.team_size.choose(self.maximum)) for _ in range(n_passes)]

    def run_pass(self, threads):
        is_late = threads > max(1, self.free_cores)
        elapsed = (30 if is_late else 10) * MS // min(threads, 2)
        self.now += elapsed
        if threads > 1:
            self.times[0] += elapsed
            self.times[1] += elapsed * 2 // 3 if is_late else elapsed // 10
        return threads


def test_an_idle_machine_keeps_all_threads():
    for maximum in (1, 2, 7):
        assert set(Machine(8, maximum).run(1000)) == {maximum}


def test_busy_cores_cost_little_more_than_one_thread_from_the_start():
    machine, fixed = Machine(1, 2), Machine(1, 1)
    machine.run(100)
    fixed.run(100)
    assert machine.now < 1.15 * fixed.now
    sizes = machine.run(1000)
    assert 0 < sizes.count(2) < 20  # trials


def test_all_threads_return_when_the_cores_are_free_again():
    machine = Machine(1, 2)
    assert machine.run(1000)[-1] == 1
    machine.free_cores, start = 2, machine.now
    while machine.run(1) != [2]:
        assert machine.now - start <= MAX_RETRY_NS
    assert set(machine.run(1000)) == {2}
    machine.free_cores = 1  # trials are frequent again
    machine.run(10)
    start = machine.now
    while machine.run(1) != [2]:
        assert machine.now - start < MAX_RETRY_NS / 4


def test_many_threads_settle_near_the_free_cores():
    machine = Machine(7, 8)
    sizes = machine.run(2000)
    assert sorted({*sizes}) == [6, 8]
    assert sizes[1000:].count(6) > 950
    machine.free_cores = 1
    assert machine.run(1000)[-100:].count(1) > 90
    machine.free_cores = 8
    assert machine.run(1000)[-1] == 8


def test_the_maximum_may_change_between_passes():
    machine = Machine(3, 8)
    machine.run(100)
    assert all(machine.team_size.choose(maximum) <= maximum for maximum in (1, 2, 8, 1, 3))


_ONE_CORE = """
import os, pathlib, subprocess, sys, time, torch
from layerskip.model import load
from layerskip.model.native import build
from layerskip.model.native.team_size import team_size

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
decoder = load(pathlib.Path(sys.argv[1]), dtype=torch.float32, compiled=True).decoder
build.processors, build._quota = lambda: 2, lambda: 2
hidden = decoder.embed(torch.zeros(1, 64, dtype=torch.int64))
def run(threads):
    torch.set_num_threads(threads)
    return decoder.run(hidden, 0, len(decoder.layers), decoder.new_cache(64))
expected = run(1)
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    sizes, deadline = [], time.monotonic() + 60
    while 1 not in sizes and time.monotonic() < deadline:
        assert torch.equal(run(2), expected)  # one of the threads leaves during the pass
        sizes.append(team_size())
finally:
    busy.kill()
    busy.wait()
print(sizes[-1])
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="of Linux")
@pytest.mark.usefixtures("compiled_kernels")
def test_two_threads_that_share_a_busy_core_become_one(tmp_path):
    tiny_models.build("llama2").save_pretrained(tmp_path)
    command = [sys.executable, "-c", _ONE_CORE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.stdout == "1\n", done.stderr


@pytest.fixture
def alternating(monkeypatch):
    """Each pass has another number of threads, or always the same; returns the setter."""

    def alternate(*sizes):
        following = itertools.cycle(sizes)
        monkeypatch.setattr(native_decoder, "team_size", lambda tiles=None: next(following))

    return alternate


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_outputs_do_not_depend_on_the_number_of_threads(kind, alternating, tmp_path):
    """Tokens of plain and self-speculative decoding, several sequences, logits and confidences."""
    weights = "16bit" if kind == "bfloat16" else kind
    tiny_models.build("qwen3-sliding", vocab_size=1500).save_pretrained(tmp_path)
    checkpoint = load(tmp_path, dtype=torch.bfloat16, weights=weights, compiled=True)
    model, decoder = LayerSkipModel(checkpoint), checkpoint.decoder
    tokens = tiny_models.token_ids("qwen3-sliding", 2, 150)
    results = []
    for sizes in ((1,), (2,), (3, 1, 2)):
        alternating(*sizes)
        answers = [
            model.generate([7, 9], mode=mode, max_new_tokens=16, ignore_eos=True, **options)
            for mode, options in (
                ("plain", {}),
                ("self-speculative", {"exit_layer": 2, "draft_tokens": 3}),
            )
        ]
        caches = [decoder.new_cache(150), decoder.new_cache(40)]
        rows = torch.cat([tokens[0], tokens[1, :40]])
        together = decoder.run_rows(
            decoder.embed(rows), 0, LAYERS, [(caches[0], 150), (caches[1], 40)]
        )
        for cache, n in zip(caches, (150, 40), strict=True):
            cache.lengths += n - 1
        hidden, token, confidence = decoder.greedy_step(
            tokens[:1, -1:], LAYERS, caches[0], with_confidence=True
        )
        choice = decoder.greedy_choice(together[None, -5:])
        logits = decoder.logits(together[None])
        results.append(
            [[a.token_ids for a in answers], together, hidden, token, confidence, *choice, logits]
        )
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected) if torch.is_tensor(value) else value == expected
