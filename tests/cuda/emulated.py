"""The compiled module on the stand-in runtime: real launch code on the host, whose launches run PTX on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ptx import standin


class Place(NamedTuple):
    """A kind of device, and how a step is captured and replayed on it."""

    device: str
    capture: Callable[[], AbstractContextManager[Any]]
    replay: Callable[[], None]


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
