"""Builds the CUDA library and its bindings on the stand-in runtime: launches run nvcc's PTX on the CPU."""

from pathlib import Path
from types import ModuleType

import pytest
from ptx import standin

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def built() -> tuple[ModuleType, standin.Runtime]:
    """The module `_C`, and the runtime that it launches on."""
    if standin.nvcc() is None:
        pytest.skip("nvcc is not on PATH")
    module, runtime = standin.build(
        "_C",
        SOURCES,
        ROOT / "python" / "bindings.cpp",
        include=[ROOT / "csrc"],
        flags=["-DMUON_KERNELS_CUDA"],
        extra=[
            ROOT / "tests" / "cuda" / "stubs.cpp",
            *((ROOT / "csrc" / "cpu" / n) for n in ("dispatch.cpp", "parallel.cpp")),
        ],
    )
    assert module
    return module, runtime
