"""Triton's own launch path on a machine without a GPU: what it compiles, tests/ptx executes.

A driver that pretends to be a device takes the place of Triton's. Specialisation, compilation and caches are Triton's,
so that recompilations are seen; only the launch is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ptx
import triton
from ptx.module import Result
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

# Bytes of shared memory that a block may have.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass
class Entry:
    """A launch that was executed."""

    kernel: str
    grid: tuple[int, int, int]
    result: Result


class Device:
    """A driver for Triton, whose current device is numbered by its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.memory: Sequence[Tensor] = ()  # what kernels reach through tables
        self.options: dict[str, Any] = {}  # of the executor
        self.log: list[Entry] = []
        self.loaded: list[str] = []  # a name for every compilation
        self.utils = self
        self._loading: dict[str, str] = {}

    # ---- what Triton asks of a driver ----

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, Any, int, int, int]:
        self.loaded.append(name)
        (path,) = (path for file, path in self._loading.items() if file.endswith(".ptx"))
        return 0, ptx.load(Path(path)).kernel(name), 0, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        constants = {path[0] for path in source.constants}

        def launch(*call: Any) -> None:
            grid, kernel, args = call[:3], call[4], call[9:]
            values = [a for i, a in enumerate(args) if i not in constants]
            values += [0] * (len(kernel.info.params) - len(values))  # scratch memory that nobody uses
            result = kernel.launch(
                grid, 32 * metadata.num_warps, values, metadata.shared, memory=self.memory, guard=True, **self.options
            )
            self.log.append(Entry(kernel.info.name, grid, result))

        return launch

    @contextmanager
    def active(self, memory: Sequence[Tensor] = (), **options: Any) -> Iterator[list[Entry]]:
        """Launches inside go to this device; their log."""

        def loading(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
            self._loading = files

        driver = triton.runtime.driver
        before, driver._active = driver._active, self  # type: ignore[assignment]
        self.memory, self.options, self.log = memory, options, []
        with knobs.runtime.scope():
            knobs.runtime.kernel_load_start_hook = loading
            try:
                yield self.log
            finally:
                driver._active = before


@cache
def device(arch: int) -> Device:
    """The device of that architecture: Triton keeps what it compiled for it."""
    return Device(arch)
