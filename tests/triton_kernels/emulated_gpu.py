"""A GPU for Triton on a machine without one: kernels are compiled for it as ever, their PTX is executed on the CPU.

`emulated(80)` puts a driver in the place of Triton's own, so that kernel[grid](...) runs unchanged, from the
specialisation of its arguments to the launch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from ptx import load, tensor_map
from ptx.module import Result
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Of shared memory that a block may have.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}


class Ran(NamedTuple):
    """A launch."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    shared_bytes: int
    result: Result | None


@dataclass
class Device:
    """What is there to see of an emulated GPU.

    Attributes:
        options: of tools/ptx's launch; None: nothing is executed.
        memory: tensors, or (begin, end), that kernels reach by addresses in memory; None: all there is.
        log: launches.
        compiled: a JITFunction for every compilation.
        captured: launches that wait for `replay`; None outside of `capture`.
    """

    arch: int | str
    multiprocessors: int = 1
    options: dict[str, Any] | None = field(default_factory=dict)
    memory: list[Any] | None = field(default_factory=list)
    log: list[Ran] = field(default_factory=list)
    compiled: list[Any] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Launches inside do not run, as in a CUDA graph."""
        self.captured = waiting = []
        try:
            yield
        finally:
            self.replay, self.captured = lambda: [launch() for launch in waiting] and None, None

    def replay(self) -> None:
        """Run what was captured last."""

    def warnings(self) -> list[str]:
        """Of the executor, but for threads that store the same value: Triton's sums do."""
        found = [ran.result.warning for ran in self.log if ran.result]
        return [warning for warning in found if warning and "(the same value)" not in warning]

    def kernels(self, function: Any) -> list[Any]:
        """Triton's CompiledKernels of a JITFunction for such a device."""
        return list(function.device_caches[driver.active.get_current_device()][0].values())


def _flat(args: Any, signature: Any) -> Iterator[Any]:
    """The arguments that a kernel is passed: neither constants nor None."""
    for arg, of in zip(args, signature, strict=True):
        if isinstance(of, tuple):
            yield from _flat(arg, of)
        elif of != "constexpr":
            yield of, arg


class _Launcher:
    """What Triton makes of a compiled kernel to call it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature, self.metadata = tuple(src.signature.values()), metadata

    def __call__(self, x: int, y: int, z: int, _stream: Any, text: str, *rest: Any) -> None:
        device, m = driver.active.device, self.metadata
        if device.captured is not None:
            device.captured.append(partial(self, x, y, z, _stream, text, *rest))
            return
        if device.options is None:
            device.log.append(Ran(m.name, (x, y, z), m.num_warps, m.shared, None))
            return
        args: list[Any] = []
        descriptors = iter(self.metadata.tensordesc_meta or ())
        for of, arg in _flat(rest[4:], self.signature):
            if of.startswith("tensordesc"):
                meta = next(descriptors)
                # A descriptor holds an address; whose it is, is known by the pointer that is passed as well.
                base = next(t for t in args if isinstance(t, torch.Tensor) and t.data_ptr() == arg.base.data_ptr())
                view = base.as_strided(arg.shape, arg.strides)
                args += [tensor_map(view, meta["block_size"], (0, 32, 64, 128)[meta["swizzle"]])]
                args += [*arg.shape, *arg.strides]
            elif of.startswith("fp"):
                args.append(float(arg))
            else:
                args.append(arg)
        assert not (m.global_scratch_size or m.profile_scratch_size)
        if x * y * z:
            kernel = load(text).kernel(m.name)
            result = kernel.launch(
                (x, y, z), 32 * m.num_warps, [*args, 0, 0], m.shared, memory=device.memory, **device.options
            )
            device.log.append(Ran(m.name, (x, y, z), m.num_warps, m.shared, result))


class _Utils:
    """What Triton asks of the CUDA driver."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_device_properties(self, _: Any) -> dict[str, int]:
        device = self._device
        return {"max_shared_mem": SHARED_BYTES[device.arch], "multiprocessor_count": device.multiprocessors}

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return binary, None if self._device.options is None else binary.decode(), 0, 0, 1024

    def unload_module(self, _: Any) -> None:
        pass


class _Driver:
    """Triton's driver, as far as launches need it."""

    launcher_cls = _Launcher

    def __init__(self, device: Device) -> None:
        self.device, self.utils = device, _Utils(device)

    def get_current_device(self) -> Any:
        device = self.device  # Triton keeps kernels by what is returned
        return "emulated", device.arch, device.multiprocessors, device.options is None

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        arch = self.device.arch
        return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _ptx_is_the_binary(*stage: Any) -> Any:
    """Triton's hook into its stages: no ptxas. It also keeps what is so compiled apart from other builds."""
    if not stage:
        return "emulated", hashlib.sha256(b"emulated").hexdigest()
    stages = stage[1]
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


@contextmanager
def _active(device: Device, stages: Any) -> Iterator[Device]:
    place = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    before = getattr(driver, place)
    driver.set_active(_Driver(device))
    hooks = {"jit_cache_hook": lambda *, fn, **_: device.compiled.append(fn.jit_function) and None}
    if hasattr(knobs.runtime, "add_stages_inspection_hook"):
        hooks["add_stages_inspection_hook"] = stages
    elif stages is not None:
        pytest.skip("Triton 3.4 has no hook into its stages: what it compiles can be read, not executed")
    with pytest.MonkeyPatch.context() as patch:
        for name, hook in hooks.items():
            patch.setattr(knobs.runtime, name, hook)
        try:
            yield device
        finally:
            setattr(driver, place, before)


def emulated(
    arch: int = 80, multiprocessors: int = 1, memory: Sequence[Any] | None = (), **options: Any
) -> AbstractContextManager[Device]:
    """Inside, kernels run on a GPU of compute capability arch / 10, with `memory` as in Device."""
    return _active(Device(arch, multiprocessors, options, None if memory is None else [*memory]), _ptx_is_the_binary)


def compiling(arch: int | str, multiprocessors: int = 1, binary: bool = True) -> AbstractContextManager[Device]:
    """Inside, kernels are compiled for compute capability arch / 10, or an AMD architecture, down to the binary or to
    PTX; calls of them do nothing."""
    return _active(Device(arch, multiprocessors, None), None if binary else _ptx_is_the_binary)
