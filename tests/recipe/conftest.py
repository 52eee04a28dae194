import pytest

from causal_lms import build


@pytest.fixture
def llama():
    return build("llama")
