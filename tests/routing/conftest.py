"""Run tests with both backends of `--moe-kernels`."""

from importlib.util import find_spec

import pytest

TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"))


@pytest.fixture(params=["torch", TRITON])
def kernels(request: pytest.FixtureRequest) -> str:
    """Return a value of `--moe-kernels`."""
    return request.param
