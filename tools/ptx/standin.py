"""Extensions built from CUDA sources, launch code and bindings included, on a stand-in for the CUDA runtime."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .module import (
    ASYNCHRONY,
    DEVICE,
    ORDERS,
    Asynchrony,
    CompiledModule,
    Launch,
    LaunchError,
    LineProfile,
    Order,
    cached,
    load,
    run,
    tensor_range,
    u32s,
)
from .parser import PtxError
from .profile import Profile


class Device(ctypes.Structure):
    """Limits of the device that the stand-in pretends to be; Device of cudart.cpp."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in (
            "major",
            "minor",
            "multiprocessors",
            "shared_optin",
            "shared_multiprocessor",
            "threads_multiprocessor",
            "any_memory",
        )
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("order", ctypes.c_uint32),
        ("asynchrony", ctypes.c_uint32),
        ("spin_limit", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("blocks", ctypes.POINTER(ctypes.c_uint32)),
        ("block_count", ctypes.c_uint64),
    ]


class _KernelInfo(ctypes.Structure):
    _fields_ = [
        ("run", ctypes.c_void_p),
        ("param_count", ctypes.c_uint32),
        ("offsets", ctypes.POINTER(ctypes.c_uint32)),
        ("sizes", ctypes.POINTER(ctypes.c_uint32)),
        ("param_bytes", ctypes.c_uint32),
        ("static_shared", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
        ("required_threads", ctypes.c_uint32),
        ("profile", ctypes.POINTER(LineProfile)),
    ]


class _LogEntry(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 512),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("shared", ctypes.c_uint64),
        ("error", ctypes.c_int32),
        ("cooperative", ctypes.c_int32),
        ("warnings", ctypes.c_uint32),
        ("warning", ctypes.c_char * 512),
    ]


_Resolve = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_KernelInfo))
_VariableAddress = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_char_p)

# By compute capability: multiprocessors, the shared memory that a block may opt in to, and the shared memory and the
# threads of a multiprocessor.
DEVICES = {
    (8, 0): (108, 163 << 10, 164 << 10, 2048),
    (8, 6): (84, 99 << 10, 100 << 10, 1536),
    (8, 9): (128, 99 << 10, 100 << 10, 1536),
    (9, 0): (132, 227 << 10, 228 << 10, 2048),
    (10, 0): (148, 227 << 10, 228 << 10, 2048),
    (12, 0): (170, 99 << 10, 100 << 10, 1536),
}


@dataclass(frozen=True)
class Launched:
    """Launch in the log. `error` is the cudaError_t that it returned."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: int
    shared_bytes: int
    error: int
    cooperative: bool
    warnings: int
    warning: str


class Runtime:
    """Stand-in for the CUDA runtime, inside an extension built by `build`."""

    def __init__(self, library: Path, sources: Sequence[Path]) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, kind in {
            "device": ctypes.POINTER(Device),
            "options": ctypes.POINTER(_Options),
            "log_size": ctypes.c_uint64,
            "log": ctypes.POINTER(_LogEntry),
            "failure_count": ctypes.c_uint64,
            "failure": ctypes.POINTER(Launch),
            "failed_kernel": ctypes.c_char_p,
            "kernel_name": ctypes.c_char_p,
        }.items():
            getattr(self._library, f"standin_{name}").restype = kind
        self._texts = [p.read_text() for p in sources]
        self._modules: list[CompiledModule | None] = [None] * len(sources)
        self._races = self._profile = False
        self._counters: dict[str, Any] = {}
        self._alive: list[Any] = []
        self.build_errors: list[str] = []
        self.asked_for: set[str] = set()  # kernels that were launched, or loaded
        callbacks = (_Resolve(self._resolve), _VariableAddress(self._variable))
        self._alive.append(callbacks)
        self._library.standin_callbacks(*callbacks)

    @property
    def device(self) -> Device:
        return self._library.standin_device().contents  # type: ignore[no-any-return]

    def pretend(self, major: int, minor: int = 0) -> None:
        """Take the limits of this compute capability."""
        d = self.device
        d.major, d.minor = major, minor
        d.multiprocessors, d.shared_optin, d.shared_multiprocessor, d.threads_multiprocessor = DEVICES[major, minor]

    @property
    def kernels(self) -> list[str]:
        """Device names of all kernels that the host code registered."""
        names: list[str] = []
        while (name := self._library.standin_kernel_name(ctypes.c_uint64(len(names)))) is not None:
            names.append(name.decode())
        return names

    def _module(self, name: str) -> CompiledModule:
        for i, text in enumerate(self._texts):
            if name in text:
                module = self._modules[i] = self._modules[i] or load(text)
                if name in module.kernels or name in module.ptx.variables:
                    return module
        raise PtxError(f"no PTX has {name}")

    def _resolve(self, name: bytes, info: Any) -> int:
        self.asked_for.add(name.decode())
        # An exception must not cross the C++ frames in between: it becomes an error code and a line in build_errors.
        try:
            module = self._module(name.decode())
            launchable = module.kernel(name.decode())
            kernel = launchable.info
            count = len(kernel.params)
            numbers = ctypes.c_uint32 * max(count, 1)
            offsets = numbers(*[offset for offset, _ in kernel.params])
            sizes = numbers(*[p.bytes for _, p in kernel.params])
            self._alive += [offsets, sizes]
            target = info.contents
            target.run = ctypes.cast(launchable.entry(self._races, self._profile), ctypes.c_void_p).value
            target.param_count, target.offsets, target.sizes = count, offsets, sizes
            target.param_bytes, target.static_shared = kernel.param_bytes, kernel.static_shared
            target.max_threads, target.required_threads = kernel.max_threads or 0, kernel.required_threads or 0
            if self._profile:
                counters = self._counters.setdefault(kernel.name, (LineProfile * module.lines)())
                target.profile = counters
            return 0
        except Exception as error:
            self.build_errors.append(f"{name.decode()}: {error}")
            return 1

    def _variable(self, name: bytes) -> int:
        try:
            return self._module(name.decode()).variable(name.decode(), self._races, self._profile)
        except Exception as error:
            self.build_errors.append(f"{name.decode()}: {error}")
            return 0

    @contextmanager
    def options(
        self,
        *,
        order: Order = "forward",
        asynchrony: Asynchrony = "early",
        seed: int = 0,
        races: bool = False,
        profile: bool = False,
        any_memory: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> Iterator[Runtime]:
        """Set how kernels run inside this context. The log, the failures and the profiles begin empty.

        The options are those of `LaunchableKernel.launch`. With `any_memory`, bounds are not checked.
        """
        chosen = self._library.standin_options().contents
        chosen.order, chosen.asynchrony, chosen.seed = ORDERS[order], ASYNCHRONY[asynchrony], seed
        chosen.blocks, chosen.block_count = u32s(blocks), len(blocks or ())
        self._races, self._profile = races, profile
        self.device.any_memory = any_memory
        self._counters.clear()
        self.build_errors.clear()
        self._library.standin_clear()
        self._library.standin_forget()
        try:
            yield self
        finally:
            chosen.order = chosen.asynchrony = chosen.seed = chosen.block_count = 0
            chosen.blocks = None
            self._races = self._profile = False
            self.device.any_memory = False
            self._library.standin_forget()

    def register(self, *tensors: Any, guard: bool = False) -> None:
        """Let kernels access the memory of these tensors."""
        for t in tensors:
            begin, end = tensor_range(t, guard)
            self._library.standin_add_range(ctypes.c_uint64(begin), ctypes.c_uint64(end))

    def forget_memory(self) -> None:
        self._library.standin_clear_ranges()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Keep launches inside for `replay`, as in a CUDA graph. Calls that wait for the device fail."""
        self._library.standin_begin_capture()
        try:
            yield
        finally:
            self._library.standin_end_capture()

    def fail_next(self, error: int, function: str = "cudaLaunchKernel") -> None:
        """Let the next call of this function of the runtime do nothing and return this cudaError_t."""
        self._library.standin_fail_next(ctypes.c_int32(error), function.encode())

    @property
    def last_error(self) -> int:
        """Error (cudaError_t) that cudaGetLastError would return."""
        return int(self._library.standin_last_error())

    def replay(self) -> int:
        """Run what was captured with the parameters it was captured with.

        Returns:
            A cudaError_t, which is not 0 if nothing was captured.
        """
        return int(self._library.standin_replay())

    @property
    def log(self) -> list[Launched]:
        entries = [
            self._library.standin_log(ctypes.c_uint64(i)).contents for i in range(self._library.standin_log_size())
        ]
        return [
            Launched(
                e.kernel.decode(),
                tuple(e.grid),
                tuple(e.block),
                e.cluster,
                e.shared,
                e.error,
                bool(e.cooperative),
                e.warnings,
                e.warning.decode(errors="replace"),
            )
            for e in entries
        ]

    @property
    def failures(self) -> list[LaunchError]:
        """Reports of the launches that failed."""
        result = []
        for i in range(self._library.standin_failure_count()):
            name = self._library.standin_failed_kernel(ctypes.c_uint64(i)).decode()
            result.append(self._module(name).error(self._library.standin_failure(ctypes.c_uint64(i)).contents, name))
        return result

    @property
    def profiles(self) -> dict[str, Profile]:
        """Profile of each kernel, over all its launches inside `options(profile=True)`."""
        return {n: Profile(self._module(n).ptx.functions[n].body, c) for n, c in self._counters.items()}


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_ptx(source: str | os.PathLike[str], arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """Compile a .cu file to PTX with line information."""
    # PTX names its source: of two equal files each must find its own.
    contents = [arch, *flags, str(Path(source).resolve()), _with_includes(Path(source), flags)]
    command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-lineinfo", *flags, source, "-o"]
    return cached(".ptx", contents, lambda out: run([*map(str, command), str(out)]) and None).read_text()


@cache
def _dependencies(source: Path, flags: tuple[str, ...], modified: int) -> list[Path]:
    """Files of the project that a source includes. `modified` is its time: nvcc is asked again after an edit."""
    names = run(["nvcc", "-M", "-std=c++17", *flags, source]).replace("\\\n", " ").split(":", 1)[1].split()
    return [Path(n) for n in names if not n.startswith(("/usr", "/opt")) and Path(n).exists()]


def _with_includes(source: Path, flags: Sequence[str]) -> str:
    """Text of all files that a source depends on, since a changed header must lead to a new build."""
    return "\0".join(p.read_text() for p in _dependencies(source, tuple(flags), source.stat().st_mtime_ns))


def _object(source: Path, arch: str, flags: Sequence[str]) -> tuple[Path, Path]:
    """Compile a .cu file to a host object and PTX, by one run of nvcc.

    From one run to the next the names of kernels without linkage differ.
    """
    contents = ["object", arch, *flags, _with_includes(source, flags)]

    def make(out: Path) -> None:
        keep = out.parent / "keep"
        keep.mkdir()
        command = [
            "nvcc",
            "-c",
            "-gencode",  # PTX alone: ptxas takes most of the time, and nobody looks at what it makes
            f"arch={arch.replace('sm', 'compute')},code={arch.replace('sm', 'compute')}",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler",
            "-fPIC",
            "-keep",
            "-keep-dir",
            keep,
        ]
        out.mkdir()
        run([*map(str, command), *flags, str(source), "-o", str(out / "host.o")])
        ptx = next(keep.glob("*.ptx"))
        ptx.rename(out / "device.ptx")

    directory = cached(".object", contents, make)
    return directory / "host.o", directory / "device.ptx"


def _host_object(source: Path, flags: Sequence[str]) -> Path:
    import pybind11

    toolkit = re.findall(r"-I([^\s\"]+)\"", run(["nvcc", "-dryrun", "-E", source], stderr=True))
    include = [pybind11.get_include(), sysconfig.get_path("include"), *toolkit]
    own = ["-O1", "-fPIC", "-std=c++17", "-w", *flags, *(f"-I{path}" for path in include)]
    contents = ["host", *own, _with_includes(source, [f for f in own if f.startswith(("-I", "-D"))])]
    return cached(".o", contents, lambda out: run(["g++", "-c", *own, source, "-o", out]) and None)


def build(
    name: str,
    sources: Sequence[str | os.PathLike[str]],
    bindings: str | os.PathLike[str] | None = None,
    *,
    arch: str | Callable[[Path], str] = "sm_80",
    include: Sequence[str | os.PathLike[str]] = (),
    flags: Sequence[str] = (),
    extra: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], Sequence[str]]] = (),
) -> tuple[ModuleType | None, Runtime]:
    """Build an extension from CUDA sources, with the stand-in in the place of the CUDA runtime.

    Args:
        name: name of the Python module that `bindings` define.
        sources: .cu files, with kernels and the host code that launches them.
        bindings: pybind11 source; None for an extension without a Python module.
        arch: architecture, or a function that returns the architecture of a source.
        include: folders of headers.
        flags: more flags for nvcc and g++.
        extra: more host sources, each alone or with flags of its own; or objects and archives.

    Returns:
        The imported module, None without `bindings`, and the runtime inside it.
    """
    flags = [*flags, *(f"-I{path}" for path in include)]
    which = arch if callable(arch) else lambda path: arch
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda s: _object(Path(s), which(Path(s)), flags), sources))
    objects = [o for o, _ in parts]
    for item in [*extra, *([bindings] if bindings else [])]:
        source, more = item if isinstance(item, tuple) else (item, ())
        path = Path(source)
        objects.append(path if path.suffix in (".o", ".a", ".so") else _host_object(path, [*flags, *more]))
    runtime = DEVICE / "cudart.cpp"
    contents = ["cudart", *[p.read_text() for p in (runtime, DEVICE / "launch.h", DEVICE / "tensor_map.h")]]
    command = ["nvcc", "-c", "-std=c++17", "-O1", "-Xcompiler", "-fPIC", runtime, "-o"]
    objects.append(cached(".o", contents, lambda out: run([*command, out]) and None))
    # Symbols are bound inside the object: torch may have brought a real CUDA runtime into the process.
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-pthread", "-ldl", "-o"]
    suffix = f".{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    library = cached(suffix, ["link", name, *map(str, objects)], lambda out: run([*link, out]) and None)
    module = None
    if bindings:
        spec = importlib.util.spec_from_file_location(name, library)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module, Runtime(library, [p for _, p in parts])
