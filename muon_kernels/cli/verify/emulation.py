"""The CUDA backend on what executes its kernels in the place of a GPU: tools/ptx, which only the source tree has.

Real launch code of the host, compiled against a stand-in for CUDA's runtime, whose launches run nvcc's PTX on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from ... import options
from ...backends import cuda
from .stage import Graph, Place

ROOT = Path(__file__).resolve().parents[3]


def missing(root: Path = ROOT) -> str | None:
    """Return why nothing can be executed, and how to mend it; None if it can."""
    if not (root / "tools" / "ptx" / "standin.py").exists():
        return (
            f"--emulated needs tools/ptx beside the package, but {root} has none, as no wheel has; run it in a "
            'checkout of the repository, after pip install -e ".[test]"'
        )
    if _standin(root).nvcc() is None:
        return "--emulated needs nvcc on PATH, which compiles the kernels; pip install nvidia-cuda-nvcc brings it, too"
    return None


def _standin(root: Path = ROOT) -> Any:
    """Import tools/ptx's module."""
    if str(root / "tools") not in sys.path:
        sys.path.append(str(root / "tools"))
    return import_module("ptx.standin")


@cache
def build() -> tuple[ModuleType, Any]:
    """Return the module `_C` with all of csrc/cuda, and the runtime that it launches on."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    of_hopper = [path for path in sources if path.stem.endswith("_sm90")]
    module, runtime = _standin().build(
        "_C",
        sources,
        ROOT / "python" / "bindings.cpp",
        arch=lambda path: "sm_90a" if path in of_hopper else "sm_80",
        include=[ROOT / "csrc"],
        flags=["-DMUON_KERNELS_CUDA", *(["-DMUON_KERNELS_SM90"] if of_hopper else [])],
        extra=[ROOT / "csrc" / "cpu" / name for name in ("dispatch.cpp", "parallel.cpp")],
    )
    return cast(ModuleType, module), runtime


class OnTheCpu(cuda._Device):
    """Takes CPU tensors; launches go to the executor."""

    type = "cpu"

    def module(self) -> ModuleType:
        """Return the module that is built on the stand-in."""
        return build()[0]

    def unavailable(self) -> None:
        """Return None: the executor is here."""
        return None

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        super().__init__()
        self._capability = capability

    def has_wgmma(self) -> bool:
        """Return True: all code is built."""
        return True

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Return that of the code that is executed."""
        return self._capability

    def name(self, device: torch.device) -> str:
        """Return a name that no GPU has, for which nothing is kept."""
        return "executor of {}.{}".format(*self._capability)

    def stream(self, device: torch.device) -> int:
        """Return the only stream."""
        return 0

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Do nothing: there is one device."""
        return nullcontext()

    def load(self, device: torch.device) -> None:
        """Load nothing: the executor would compile what is not launched."""


@contextmanager
def running(capability: tuple[int, int] = (8, 0)) -> Iterator[Any]:
    """Run the backend on the stand-in runtime, as on a GPU of this capability; yield the runtime."""
    _, runtime = build()
    before, cuda._device = cuda._device, OnTheCpu(capability)
    runtime.pretend(*capability)
    try:
        with runtime.options(any_memory=True):
            yield runtime
    finally:
        runtime.pretend(8, 0)
        cuda._device = before


@contextmanager
def place() -> Iterator[Place]:
    """Yield the executor as a place for stages, inside this context."""
    on_host = options.on_host
    with running() as runtime:

        def replay() -> None:
            if error := runtime.replay():
                raise RuntimeError(f"a replay failed with CUDA error {error}")

        # Scalars in tensors are on the device, though that is the processor.
        options.on_host = lambda value: not isinstance(value, torch.Tensor)
        try:
            yield Place("executor", "cpu", ("cuda",), lambda: Graph(runtime.capture, replay), "sm_80")
        finally:
            options.on_host = on_host
