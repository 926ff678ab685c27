"""Kernels are loaded before a graph may need them."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from ptx.parser import PtxError

from muon_kernels.backends import cuda


def test_all_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be loaded stops none of the others, and is no error of the next launch."""
    module, runtime = emulated.build()

    def nothing(name: str) -> Any:
        raise PtxError(f"{name} is not compiled for this")

    monkeypatch.setattr(runtime, "_module", nothing)
    module.cuda.load_kernels()
    assert runtime.asked_for == set(runtime.kernels) and len(runtime.kernels) > 30
    assert runtime.last_error == 0


def test_a_device_is_asked_once_to_load() -> None:
    """With the first launch on it, by a device as it is outside of tests."""
    loaded = []

    class Module:
        class cuda:
            load_kernels = staticmethod(lambda: loaded.append("all"))

    class Device(cuda._Device):
        def module(self) -> Any:
            return Module

    device = Device()
    for index in (0, 1, 0, 1, 0):
        device.load(torch.device("cuda", index))
    assert loaded == ["all", "all"]
