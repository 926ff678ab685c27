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
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
Place = int | str  # compute capability, or AMD's name


@dataclass
class Compilation:
    """Of a kernel, for one specialisation."""

    kernel: str
    shared: int
    files: dict[str, str]  # what the compiler wrote, by name

    def text(self, kind: str) -> str:
        """ptx, amdgcn, ..."""
        return self.path(kind).read_text()

    def path(self, kind: str) -> Path:
        (path,) = (path for file, path in self.files.items() if file.endswith(f".{kind}"))
        return Path(path)


@dataclass
class Entry:
    """A launch."""

    kernel: str
    grid: tuple[int, int, int]
    result: Result | None  # None if it was not executed


def faults(log: Sequence[Entry]) -> list[str]:
    """What the executor has warned of, but for threads that store the same value: the sums of Triton do."""
    warnings = [entry.result.warning for entry in log if entry.result]
    return [warning for warning in warnings if warning and "(the same value)" not in warning]


class Device:
    """A driver for Triton, and its only device."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.memory: Sequence[Tensor] = ()  # what kernels reach through tables
        self.execute = True
        self.options: dict[str, Any] = {}  # of the executor
        self.log: list[Entry] = []
        self.compilations: list[Compilation] = []
        self.utils = self
        self._loading: dict[str, str] = {}

    # ---- what Triton asks of a driver ----

    def get_current_device(self) -> Device:
        return self

    def get_current_stream(self, device: Device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.place, 32) if isinstance(self.place, int) else GPUTarget("hip", self.place, 64)

    def get_device_properties(self, device: Device) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.place]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: Device) -> tuple[int, Any, int, int, int]:
        self.compilations.append(Compilation(name, shared, self._loading))
        return 0, self.compilations[-1], 0, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        constants = {path[0] for path in source.constants}

        def launch(*call: Any) -> None:
            grid, compilation, args = call[:3], call[4], call[9:]
            result = None
            if self.execute:
                kernel = ptx.load(compilation.path("ptx")).kernel(compilation.kernel)
                values = [a for i, a in enumerate(args) if i not in constants]
                values += [0] * (len(kernel.info.params) - len(values))  # scratch memory that nobody uses
                threads = 32 * metadata.num_warps
                memory = self.memory
                result = kernel.launch(
                    grid, threads, values, metadata.shared, memory=memory, guard=True, **self.options
                )
            self.log.append(Entry(compilation.kernel, grid, result))

        return launch

    @contextmanager
    def active(self, memory: Sequence[Tensor] = (), execute: bool = True, **options: Any) -> Iterator[list[Entry]]:
        """Launches inside go to this device; their log."""

        def loading(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
            self._loading = files

        driver = triton.runtime.driver
        before, driver._active = driver._active, self  # type: ignore[assignment]
        self.memory, self.execute, self.options, self.log = memory, execute, options, []
        with knobs.runtime.scope():
            knobs.runtime.kernel_load_start_hook = loading
            try:
                yield self.log
            finally:
                driver._active = before


@cache
def device(place: Place) -> Device:
    """The device of that architecture: Triton keeps what it compiled for it."""
    return Device(place)


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
def executed(place: Place, memory: Sequence[Tensor], **options: Any) -> Iterator[list[Entry]]:
    """Launches inside run on the device of that architecture or, for 0, in the interpreter; their log."""
    if place:
        with device(place).active(memory, **options) as log:
            yield log
    else:
        yield []
