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
        flags=["-DMUON_KERNELS_CUDA"],
        extra=[ROOT / "csrc" / "cpu" / name for name in ("dispatch.cpp", "parallel.cpp")],
    )
    assert module
    return module, runtime


class OnTheCpu(cuda._Device):
    """Takes CPU tensors; launches go to the executor."""

    type = "cpu"

    def module(self) -> ModuleType:
        return build()[0]

    def unavailable(self) -> None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return 8, 0

    def stream(self, device: torch.device) -> int:
        return 0

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def load(self, device: torch.device) -> None:
        """Load nothing: the executor would compile what no test launches."""


@contextmanager
def running() -> Iterator[standin.Runtime]:
    """Inside, the backend runs on the stand-in runtime. Nothing outside the tests can switch this on."""
    _, runtime = build()
    with pytest.MonkeyPatch.context() as patch, runtime.options(any_memory=True):
        patch.setattr(cuda, "_device", OnTheCpu())
        yield runtime
