"""The compiled module on the stand-in runtime: real launch code on the host, whose launches run PTX on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

from ptx import standin

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
