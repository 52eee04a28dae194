"""What several rooms' tests share."""

import pytest
from hypothesis import settings

from layerskip import LayerSkipModel
from layerskip.model import pull

settings.register_profile("layerskip", deadline=None)  # no test depends on a time
settings.load_profile("layerskip")


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M, fetched once into the cache folder; for tests with the marker `real`."""
    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """SmolLM2-135M in float32, where results are exact."""
    return LayerSkipModel.from_pretrained(smollm2_folder, dtype="float32")
