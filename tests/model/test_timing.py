"""Cost of positions, timed once with the decoder's own layers, with and without compiled kernels."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from time import sleep
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from layerskip.model import load
from layerskip.model import step_timing as timing
from layerskip.model.native import build
from layerskip.model.step_timing import pass_costs

# Two rows cost nearly twice as much as one, and four less than three; from then on they cost little.
SECONDS = {1: 1.0, 2: 1.75, 3: 2.25, 4: 1.5, 5: 1.5, 6: 1.5, 8: 2.0, 12: 2.0, 16: 3.0}
SECONDS |= {24: 4.0, 32: 4.5}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache; gives the folder for costs."""
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_measured", {})
    monkeypatch.setattr(timing, "_drafts", {})
    # What it says of this folder is not to be kept for other tests.
    monkeypatch.setattr(build, "target", build.target.__wrapped__)
    return tmp_path / "passes"


@pytest.fixture
def no_compiler(folder, monkeypatch):
    def refuse():
        raise build.NoCompilerError

    monkeypatch.setattr(build, "_compiler", refuse)


class Machine:
    """A clock that products move on, and how often each number of rows was asked for."""

    def __init__(self):
        self.now, self.seconds, self.late, self.calls = 0.0, dict(SECONDS), {}, []
        self.attention = 0.125

    def perf_counter(self):
        return self.now

    def __call__(self, n, settled):
        """Some take longer in the n-th call of so many rows; attention adds a quarter and more a row."""
        if settled:
            self.now += self.seconds[n] + 0.25 + self.attention * (n - 1)
            return
        self.calls.append(n)
        self.now += self.seconds[n] + self.late.get((n, self.calls.count(n)), 0.0)


@pytest.fixture
def machine(folder, monkeypatch):
    """Its products are what every decoder's layers take."""
    machine = Machine()
    monkeypatch.setattr(timing, "time", machine)
    monkeypatch.setattr(timing, "_first_layers", lambda decoder, threads: machine)
    return machine


def damaged_by(**changes):
    whole = {"passes": [1.0] * 32, "attention": [0.1] * 32}
    return json.dumps(whole | changes)


def decoder(dtype=torch.float32, weights="16bit", **changes):
    fields = {"architecture": "tiny", "kernels": "pytorch", "cache_dtype": dtype, **changes}
    return SimpleNamespace(
        dtype=dtype, weights=weights, dtype_name=str(dtype)[6:], weight_bytes=100, **fields
    )


def test_costs_are_the_least_times_in_units_of_one_row(machine):
    machine.late = {(5, 1): 9.0, (1, 2): 0.5, (16, 3): 1.0}
    costs = pass_costs(decoder())
    assert costs.passes[:6] == (1.0, 1.75, 2.25, 1.5, 1.5, 1.5)
    assert costs.passes[6] == 1.75  # between six and eight
    assert costs.passes[7:12] == (2.0,) * 5
    assert (costs.passes[13], costs.passes[15], costs.passes[31]) == (2.5, 3.0, 4.5)
    assert costs.attention == tuple(0.25 + 0.125 * more for more in range(32))


def test_kept_and_taken_from_there_by_the_next_process(machine, folder, monkeypatch):
    costs = pass_costs(decoder())
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == json.loads(json.dumps(dataclasses.asdict(costs)))
    asked = len(machine.calls)
    other = timing.PassCosts((1.0, *[9.0] * 31), (0.5,) * 32)
    file.write_text(json.dumps(dataclasses.asdict(other)))
    assert pass_costs(decoder()) == costs
    monkeypatch.setattr(timing, "_measured", {})
    assert pass_costs(decoder()) == other
    assert len(machine.calls) == asked


def test_a_damaged_file_is_made_again(machine, folder, monkeypatch):
    for damaged in (
        *("{", "[" * 100_000, "{}", "\xff", damaged_by(passes=["many"])),
        *(damaged_by(attention=[0.1] * 31), damaged_by(passes=[0.5] * 32)),
    ):
        costs = pass_costs(decoder())
        (file,) = folder.iterdir()
        file.write_text(damaged, encoding="latin-1")
        monkeypatch.setattr(timing, "_measured", {})
        assert pass_costs(decoder()) == costs
        assert json.loads(file.read_text()) == json.loads(json.dumps(dataclasses.asdict(costs)))


def test_times_of_a_busy_machine_hold_for_this_process_and_their_dips_are_chance(machine, folder):
    machine.late = {(3, call): 0.2 * call for call in range(2, 99)}  # never again as in its first
    costs = pass_costs(decoder())
    assert costs.passes[:6] == (1.0, 1.75, 2.25, 2.25, 2.25, 2.25)
    assert not folder.exists()
    asked = len(machine.calls)
    assert pass_costs(decoder()) is costs
    assert len(machine.calls) == asked


def test_slow_products_of_a_busy_machine_are_given_up_on(machine, monkeypatch):
    machine.late = {(3, call): 0.2 * call for call in range(2, 99)}
    pass_costs(decoder())  # one turn takes longer than `_MAX_SECONDS`
    assert machine.calls.count(1) == timing._MIN_ROUNDS
    machine.calls.clear()
    monkeypatch.setattr(timing, "_MAX_SECONDS", float("inf"))
    pass_costs(decoder(architecture="another"))
    assert machine.calls.count(1) == timing._MAX_ROUNDS


def test_nor_is_a_user_without_a_home(machine, monkeypatch):
    def homeless():
        raise OSError("no home")

    monkeypatch.setattr(timing, "cache_folder", homeless)
    first = pass_costs(decoder())
    machine.seconds[2] = 1.0
    assert pass_costs(decoder(torch.bfloat16)) != first  # each has its own all the same


def test_every_kind_of_weights_has_its_own(machine, folder, monkeypatch):
    """PyTorch's product with 4-bit weights is for bfloat16 alone: in float32 int8 costs otherwise."""
    asked = [
        decoder(torch.bfloat16, "int8"),
        decoder(torch.float32, "int8"),
        decoder(torch.float32, "int4"),
        decoder(torch.float32),
        decoder(torch.float16),
        decoder(torch.float16, architecture="other shapes"),
        decoder(torch.float16, cache_dtype=torch.int8),
    ]
    for i, one in enumerate(asked):
        machine.seconds[2] = 1.0 + i / 8
        assert pass_costs(one).passes[1] == 1.0 + i / 8
    torch.set_num_threads(2)  # set back behind every test
    machine.seconds[2] = 1.875
    assert pass_costs(asked[0]).passes[1] == 1.875
    monkeypatch.setattr(timing, "_pytorch", lambda: "another version")
    machine.seconds[2] = 1.9375
    assert pass_costs(asked[0]).passes[1] == 1.9375
    assert len(list(folder.iterdir())) == len(asked) + 2


@pytest.mark.parametrize(
    ("case", "dtype", "weights"),
    [
        ("llama3.1", torch.bfloat16, "int4"),
        ("mixtral", torch.float32, "16bit"),
    ],
)
def test_the_layers_of_a_model_are_timed_without_a_compiler(
    case, dtype, weights, folder, no_compiler, tmp_path, monkeypatch
):
    monkeypatch.setattr(timing, "_STEADY", float("inf"))  # so little takes any time
    tiny_models.build(case).save_pretrained(tmp_path / "model")
    tiny = load(tmp_path / "model", dtype=dtype, weights=weights, compiled=False).decoder
    with torch.device("meta"), torch.autocast("cpu", torch.float16):
        costs = pass_costs(tiny)
    assert len(costs.passes) == len(costs.attention) == 32
    assert costs.passes[0] == 1.0
    (file,) = folder.iterdir()
    assert file.name.endswith(f".{str(dtype)[6:]}.{weights}.1.json")


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.bfloat16, "16bit"),
        (torch.float32, "int4"),
    ],
)
def test_the_layers_of_a_model_are_timed_in_the_compiled_kernels(
    dtype, weights, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(timing, "_STEADY", float("inf"))
    tiny_models.build("llama3.1").save_pretrained(tmp_path / "model")
    tiny = load(tmp_path / "model", dtype=dtype, weights=weights, compiled=True).decoder
    assert tiny.kernels == "compiled"
    with torch.device("meta"), torch.autocast("cpu", torch.float16):
        assert len(pass_costs(tiny).passes) == 32
    assert len(list(folder.iterdir())) == 1


@pytest.fixture
def steps_and_drafts(machine, monkeypatch):
    """A plain step takes 4, a draft what `machine.draft` says."""

    def passing(name):
        def work():
            machine.calls.append(name)
            machine.now += machine.draft if name == "draft" else 4.0

        return work

    machine.draft = 1.0
    monkeypatch.setattr(timing, "_plain_step", lambda decoder: passing("step"))
    return lambda: passing("draft")


def test_a_draft_costs_its_time_in_plain_steps(machine, steps_and_drafts, folder, monkeypatch):
    assert timing.draft_cost(decoder(), 10, steps_and_drafts) == 0.25
    assert machine.calls == ["step", "draft"] * timing._MIN_ROUNDS
    (file,) = folder.iterdir()
    machine.draft = 2.0
    assert timing.draft_cost(decoder(), 10, steps_and_drafts) == 0.25
    monkeypatch.setattr(timing, "_drafts", {})
    assert timing.draft_cost(decoder(), 10, steps_and_drafts) == 0.25  # from the file
    assert timing.draft_cost(decoder(), 11, steps_and_drafts) == 0.5  # of another adapter
    assert timing.draft_cost(decoder(), 10, steps_and_drafts, "token by token") == 0.5
    for damaged in ("{", "{}", "-1", "NaN", "[" * 100_000):
        file.write_text(damaged)
        monkeypatch.setattr(timing, "_drafts", {})
        assert timing.draft_cost(decoder(), 10, steps_and_drafts) == 0.5


def test_drafts_timed_on_a_busy_machine_are_not_stored(machine, steps_and_drafts, folder):
    drafting, now = steps_and_drafts(), iter(range(1, 999))

    def busy():
        drafting()
        machine.now += next(now)

    assert timing.draft_cost(decoder(), 10, lambda: busy) == 0.5
    assert machine.calls.count("draft") <= timing.TIMED_DRAFTS
    assert not folder.exists()


def test_two_threads_do_not_time_against_each_other(machine, monkeypatch):
    timed, alone = timing._time, Lock()

    def slow(*product):
        assert alone.acquire(blocking=False)
        sleep(0.05)
        alone.release()
        return timed(*product)

    monkeypatch.setattr(timing, "_time", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pass_costs, [decoder(), decoder()])
    assert first is second


def test_as_many_layers_as_caches_do_not_hold(monkeypatch, tmp_path):
    tiny = tiny_models.checkpoint("llama3.1", tmp_path).decoder
    ran = []

    def run(x, start, stop, cache):
        ran.append((x.shape, stop, int(cache.lengths)))

    monkeypatch.setattr(tiny, "run", run)
    timing._first_layers(tiny, 1)(5, 0)
    layer = (tiny.weight_bytes - tiny.head.weight_bytes) // tiny_models.LAYERS
    for n_bytes in (2 * layer, 1):
        monkeypatch.setattr(timing, "_MIN_BYTES", n_bytes)
        monkeypatch.setattr(timing, "_BYTES_PER_THREAD", n_bytes // 2)
        timing._first_layers(tiny, 1)(2, 0)
    timing._first_layers(tiny, 6)(2, timing.FAR)  # whose caches hold more
    monkeypatch.setattr(timing, "_BYTES_PER_THREAD", layer)
    timing._first_layers(tiny, 3)(2, 0)
    shape = (1, 2, 64)
    assert ran[0] == ((1, 5, 64), tiny_models.LAYERS, 0)
    assert ran[1:] == [(shape, 2, 0), (shape, 1, 0), (shape, 1, timing.FAR), (shape, 3, 0)]
