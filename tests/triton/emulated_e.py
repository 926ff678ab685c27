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
import torch
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


def _repaired_interpreter() -> None:
    """Triton's interpreter multiplies the bits of bf16 numbers, cuts off what bf16 has no room for, and rounds an fma
    twice."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
            return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    def values(x: Any) -> Any:
        return converted(x.data, tl.bfloat16, tl.float32, None).view(np.float32) if x.dtype == tl.bfloat16 else x.data

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        a, b = (interpreter.TensorHandle(values(t), tl.float32) for t in (a, b))
        return interpreter.TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(c.data.dtype), c.dtype.scalar)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = dot  # type: ignore[method-assign]
    interpreter.InterpreterBuilder.create_fma = fma  # type: ignore[method-assign]


if knobs.runtime.interpret:
    _repaired_interpreter()


@contextmanager
def executed(place: int, memory: Sequence[Tensor], **options: Any) -> Iterator[list[Entry]]:
    """Launches inside run on the device of that architecture or, for 0, in the interpreter; their log."""
    if place:
        with device(place).active(memory, **options) as log:
            yield log
    else:
        yield []
