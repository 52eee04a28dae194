"""Fixtures of the tests of several packages."""

import contextlib
import gc

import pytest
import torch
from hypothesis import settings

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.decoding import controller, exit_adapter
from layerskip.model import native, pull
from layerskip.model.step_timing import PassCosts

settings.register_profile("layerskip", deadline=None)  # no test depends on a time
settings.load_profile("layerskip")


def pytest_collection_finish():
    """Exempt what is imported by now from garbage collection: Trainer collects after each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Whatever draws without a generator draws the same in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny checkpoint; do not change it. Tests of others have a fixture of this name themselves."""
    return tiny_checkpoint.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M, fetched once into the cache folder; for tests with the marker `real`."""
    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """SmolLM2-135M in float32, where results are exact."""
    return LayerSkipModel.from_pretrained(smollm2_folder, dtype="float32", weights="16bit")


@pytest.fixture(scope="session")
def compiled_kernels():
    """For tests of the kernels: where they cannot be compiled, there is nothing to test."""
    try:
        native.prepare()
    except native.NoCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def kernels_that_are_there_already():
    """Else the first test that loads a model finds a line about compiling among what it looks at."""
    with contextlib.suppress(native.NoCompilerError):
        native.prepare()


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request):
    """Tiny products gain nothing from a second thread and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_waiting_between_systems(monkeypatch):
    """Threads of a system need no rest where no time is measured."""
    monkeypatch.setattr("layerskip.bench.measure.SWITCH_S", 0.0)


@pytest.fixture(autouse=True)
def no_draft_depends_on_the_machine(request, monkeypatch):
    """Rows cost little more than one, as where memory is all that takes time."""
    if request.node.get_closest_marker("real") is None:
        pytorch = {
            "stored": (1.0, 1.3),
            "16bit": (1.0, 1.06),
            "int8": (1.0, 1.15),
            "int4": (1.0, 1.3),
        }

        def costs(decoder):
            compiled = decoder.kernels == "compiled"
            return PassCosts((1.0, 1.03) if compiled else pytorch[decoder.weights])

        def draft_cost(decoder, n_bytes, drafting, way):
            return 2.0 * n_bytes / decoder.weight_bytes

        monkeypatch.setattr(controller, "pass_costs", costs)
        monkeypatch.setattr(exit_adapter, "draft_cost", draft_cost)
