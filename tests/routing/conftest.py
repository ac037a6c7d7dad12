"""Both kinds of what --moe-kernels chooses between."""

from importlib.util import find_spec

import pytest

TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"))


@pytest.fixture(params=["torch", TRITON])
def kernels(request: pytest.FixtureRequest) -> str:
    """The flag's value."""
    return request.param
