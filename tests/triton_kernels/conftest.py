"""Where Triton's kernels run: on tests/ptx, which executes what Triton compiled, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: `TRITON_INTERPRET=1 pytest tests/triton_kernels`. It is
slow; a test runs what it is good for in a process of its own.
"""

import os

# With lines of the source in it, what Triton compiles is new, and so is translated and built again, when a line moves.
# For a profile or an error that names them: TRITON_DISABLE_LINE_INFO=0.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from emulated_gpu import emulated
from step_checks import Gpu

from muon_kernels.backends import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.mend()
# What one architecture compiles to is much like what another does; these are worth both.
ON_BOTH = {
    "test_accuracy_of_the_largest",
    "test_every_order_gives_the_same_bits",
    "test_launches_and_compilations",
    "test_memory_traffic",
    "test_no_races",
    "test_options",
    "test_orders_and_races",
    "test_ragged_sizes",
    "test_scale_does_not_matter",
    "test_step",
    "test_zero_nan_and_infinity",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`place`: an architecture, or 0 for the interpreter."""
    if "place" in metafunc.fixturenames:
        places = [0] if INTERPRETED else [80, 90] if metafunc.function.__name__ in ON_BOTH else [80]
        metafunc.parametrize("place", places, ids=lambda p: f"sm_{p}" if p else "interpreter")


class OnTheCpu(backend._Device):
    """Takes CPU tensors; launches go wherever Triton's driver sends them."""

    types = ("cpu",)
    capabilities = (8, 0)

    def unavailable(self) -> None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.capabilities

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> OnTheCpu:
    """The backend takes CPU tensors. Nothing outside the tests can switch this on."""
    device = OnTheCpu()
    monkeypatch.setattr(backend, "_device", device)
    return device


@pytest.fixture(params=[80, 90, "gpu"], ids=str)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Where the backend runs: on what executes Triton's PTX, and on a GPU if there is one."""
    if request.param == "gpu":
        yield Gpu.real("triton")
        return
    request.getfixturevalue("on_the_cpu").capabilities = divmod(request.param, 10)
    # On 108 multiprocessors, what is small enough to be executed gets the smallest tile.
    with emulated(request.param, 108, None) as device:
        yield Gpu("triton", "cpu", device.capture, lambda: device.replay(), lambda: len(device.log))
        assert not device.warnings()
