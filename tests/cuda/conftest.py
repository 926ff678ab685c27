"""What all tests of csrc/cuda need: the library, built on the stand-in runtime."""

from types import ModuleType

import pytest
from emulated import build
from ptx import standin


@pytest.fixture(scope="session")
def built() -> tuple[ModuleType, standin.Runtime]:
    """See `build`."""
    if standin.nvcc() is None:
        pytest.skip("nvcc is not on PATH")
    return build()
