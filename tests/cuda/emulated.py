"""The compiled module on the stand-in runtime: real launch code on the host, whose launches run PTX on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ptx import standin

from muon_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]


@cache
def build() -> tuple[ModuleType, standin.Runtime]:
    """The module `_C` with all of csrc/cuda, and the runtime that it launches on."""
    module, runtime = standin.build(
        "_C",
        sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        ROOT / "python" / "bindings.cpp",
        include=[ROOT / "csrc"],
        arch=lambda source: "sm_90a" if source.stem.endswith("_sm90") else "sm_80",
        flags=["-DMUON_KERNELS_CUDA", "-DMUON_KERNELS_SM90"],
        extra=[ROOT / "csrc" / "cpu" / name for name in ("dispatch.cpp", "parallel.cpp")],
    )
    assert module
    return module, runtime


class OnTheCpu(cuda._Device):
    """Takes CPU tensors; launches go to the executor."""

    type = "cpu"

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self._capability = capability

    def module(self) -> ModuleType:
        return build()[0]

    def unavailable(self) -> None:
        return None

    def has_wgmma(self) -> bool:
        return True

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self._capability

    def stream(self, device: torch.device) -> int:
        return 0

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


@contextmanager
def running(capability: tuple[int, int] = (8, 0)) -> Iterator[standin.Runtime]:
    """Inside, the backend runs on the stand-in runtime. Nothing outside the tests can switch this on."""
    _, runtime = build()
    runtime.pretend(*capability)
    try:
        with pytest.MonkeyPatch.context() as patch, runtime.options(any_memory=True):
            patch.setattr(cuda, "_device", OnTheCpu(capability))
            yield runtime
    finally:
        runtime.pretend(8, 0)
