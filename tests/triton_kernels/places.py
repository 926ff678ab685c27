"""Where `backend="triton"` runs in tests: on what executes Triton's PTX, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from checks.step import Gpu
from emulated_gpu import emulated

from muon_kernels.backends import triton as backend
from muon_kernels.triton_kernels import tables


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


def running(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Where the backend runs, by the request's parameter: a GPU, or what executes an architecture's PTX."""
    if request.param == "gpu":
        yield Gpu.real("triton")
        return
    request.getfixturevalue("on_the_cpu").capabilities = divmod(request.param, 10)
    # On 108 multiprocessors, what is small enough to be executed gets the smallest tile.
    patch = request.getfixturevalue("monkeypatch")
    with emulated(request.param, 108, None) as device:
        patch.setattr(tables, "capturing", lambda _: device.captured is not None)
        yield Gpu("triton", "cpu", device.capture, lambda: device.replay(), lambda: len(device.log))
        assert not device.warnings()
