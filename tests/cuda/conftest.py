"""What all tests of csrc/cuda need: the library, built on the stand-in runtime, and places to step in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated import build
from ptx import standin
from step_checks import Gpu

from muon_kernels.backends import cuda


@pytest.fixture(scope="session")
def built() -> tuple[ModuleType, standin.Runtime]:
    """See `build`."""
    if standin.nvcc() is None:
        pytest.skip("nvcc is not on PATH")
    return build()


@pytest.fixture
def emulated(built: tuple[ModuleType, standin.Runtime], monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Runtime]:
    """The backend takes CPU tensors, and launches go to the executor. Nothing outside the tests can switch this on."""
    module, runtime = built

    class Emulated:
        type = "cpu"

        def module(self) -> ModuleType:
            return module

        def unavailable(self) -> None:
            return None

        def capability(self, device: torch.device) -> tuple[int, int]:
            return 8, 0

        def stream(self, device: torch.device) -> int:
            return 0

        def guard(self, device: torch.device) -> AbstractContextManager[Any]:
            return nullcontext()

    monkeypatch.setattr(cuda, "_device", Emulated())
    runtime.log.clear()
    with runtime.options(any_memory=True):
        yield runtime


@pytest.fixture(params=["executor", "gpu"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """Where the backend runs: on the stand-in runtime, and on a GPU if there is one."""
    if request.param == "gpu":
        return Gpu.real("cuda")
    runtime = request.getfixturevalue("emulated")

    def replay() -> None:
        assert runtime.replay() == 0

    def launches() -> int:
        assert not runtime.failures
        return len(runtime.log)

    return Gpu("cuda", "cpu", runtime.capture, replay, launches)
