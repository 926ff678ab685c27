"""What all tests of csrc/cuda need: the library, built on the stand-in runtime, and places to step in."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from checks.step import Gpu
from emulated import build, on, running
from ptx import standin


@pytest.fixture(scope="session")
def built() -> tuple[ModuleType, standin.Runtime]:
    """See `build`."""
    if standin.nvcc() is None:
        pytest.skip("nvcc is not on PATH")
    return build()


@pytest.fixture
def emulated(built: tuple[ModuleType, standin.Runtime]) -> Iterator[standin.Runtime]:
    """See `running`."""
    with running() as runtime:
        yield runtime


@pytest.fixture
def emulated_sm90(built: tuple[ModuleType, standin.Runtime]) -> Iterator[standin.Runtime]:
    """See `running`: a GPU of compute capability 9.0."""
    with running((9, 0)) as runtime:
        yield runtime


@pytest.fixture(params=["executor", "gpu"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """Where the backend runs: on the stand-in runtime, and on a GPU if there is one."""
    return Gpu.real("cuda") if request.param == "gpu" else on(request.getfixturevalue("emulated"))
