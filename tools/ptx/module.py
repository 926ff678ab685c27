"""Modules built with g++ from translated PTX, and launches of their kernels."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .parser import Location, PtxError, parse
from .profile import Profile
from .translate import Kernel, align_up, translate

DEVICE = Path(__file__).parent / "device"
ORDERS = {"forward": 0, "backward": 1, "random": 2}
ASYNCHRONY = {"early": 0, "late": 1, "random": 2}
Order = Literal["forward", "backward", "random"]
Asynchrony = Literal["early", "late", "random"]
# -ffp-contract=off: PTX says where an fma is. -fwrapv: PTX integers wrap. -O0: a kernel is long and runs briefly, and
# most of that time in what it calls, which the headers have optimised.
FLAGS = (
    "-std=c++20 -O0 -fPIC -w -mavx2 -mfma -mf16c -ffp-contract=off -fwrapv -fno-strict-aliasing -fno-gnu-unique".split()
)


class Range(ctypes.Structure):
    """Range of addresses that a kernel may touch."""

    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class LineProfile(ctypes.Structure):
    """Counters of one PTX line; LineProfile of launch.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "threads",
            "requests",
            "bytes",
            "sectors",
            "ideal_sectors",
            "wavefronts",
            "ideal_wavefronts",
            "shared_bytes",
        )
    ]


class Launch(ctypes.Structure):
    """Arguments and report of a launch; Launch of launch.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("asynchrony", ctypes.c_uint32),
        ("resident", ctypes.c_uint32),
        ("check_bounds", ctypes.c_uint32),
        ("spin_limit", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(Range)),
        ("range_count", ctypes.c_uint64),
        ("blocks", ctypes.POINTER(ctypes.c_uint32)),
        ("block_count", ctypes.c_uint64),
        ("profile", ctypes.POINTER(LineProfile)),
        ("failed", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("at_block", ctypes.c_uint32 * 3),
        ("at_thread", ctypes.c_uint32 * 3),
        ("warning_count", ctypes.c_uint32),
        ("warning_line", ctypes.c_uint32),
        ("message", ctypes.c_char * 2048),
        ("warning", ctypes.c_char * 512),
    ]


class LaunchError(PtxError):
    """Fault of a kernel while it ran, with the block, the thread, the PTX line and its place in the source."""

    def __init__(
        self,
        why: str,
        kernel: str,
        block: tuple[int, ...],
        thread: tuple[int, ...],
        line: int,
        location: Location | None,
    ) -> None:
        self.why, self.kernel, self.block, self.thread = why, kernel, block, thread
        self.line, self.location = line, location
        source = f" ({location})" if location else ""
        super().__init__(f"{kernel}, block {block}, thread {thread}, PTX line {line}{source}: {why}")


def cache_directory() -> Path:
    """Directory of finished builds: $MUON_PTX_CACHE, or one of this user inside the temporary directory."""
    path = Path(os.environ.get("MUON_PTX_CACHE") or Path(tempfile.gettempdir()) / f"muon-ptx-{os.getuid()}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(suffix: str, contents: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Return the file that `make` writes from `contents`, which is made only if it is not there yet.

    Its name has a hash of `contents`, so that a rebuilt file is never dlopened under an old path: that would return the
    old module.
    """
    key = hashlib.sha256("\0".join(contents).encode()).hexdigest()[:24]
    target = cache_directory() / f"{key}{suffix}"
    if target.exists():
        return target
    with open(cache_directory() / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in parallel want the same builds
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            made = Path(scratch) / f"made{suffix}"
            make(made)
            made.rename(target)
    return target


def run(command: Sequence[str | os.PathLike[str]], stderr: bool = False) -> str:
    """Run a compiler; return its stdout, or its stderr. Raises PtxError with its message if it fails."""
    if shutil.which(command[0]) is None:
        raise PtxError(f"expected {command[0]} on PATH, got none; install it, or put its folder on PATH")
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PtxError(f"{command[0]} failed:\n{done.stderr[:4000] or done.stdout[:4000]}")
    return done.stderr if stderr else done.stdout


def compile_module(source: str, flags: Sequence[str]) -> Path:
    """Compile a translated module to a shared object.

    The headers, which take longer than most kernels, and the runtime are compiled once for all modules.
    """
    headers = [p.read_text() for p in sorted(DEVICE.glob("*.h"))]
    pch = cached(
        ".h.gch",
        [*flags, *headers],
        lambda out: run(["g++", *flags, "-x", "c++-header", DEVICE / "async.h", "-o", out]) and None,
    )
    stub = pch.with_suffix("")
    runtime = cached(
        ".o",
        ["runtime", *flags, *headers],
        lambda out: run(["g++", *flags, "-O1", "-c", DEVICE / "runtime.cpp", "-o", out]) and None,
    )

    def make(out: Path) -> None:
        file = out.with_suffix(".cpp")
        file.write_text(source)
        run(["g++", *flags, "-I", DEVICE, "-include", stub, "-shared", file, runtime, "-o", out])

    return cached(".so", [source, *flags, *headers], make)


@dataclass(frozen=True)
class Result:
    """Warnings of a launch, the text of the first, and its profile if one was asked for."""

    kernel: str
    warnings: int
    warning: str
    profile: Profile | None


class CompiledModule:
    """PTX module. A kernel, with or without checks, is translated and built when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ptx = parse(text)
        self.kernels = [f.name for f in self.ptx.functions.values() if f.entry]
        self.locations = {
            s.line: s.location for f in self.ptx.functions.values() for s in f.body if s.location is not None
        }
        self.lines = text.count("\n") + 2
        storage = [v.name for v in self.ptx.variables.values() if v.space in ("global", "const")]
        # String constants of assertions need not be one.
        self._shared = [name for name in storage if not name.startswith(("$str", "__unnamed", "__func__"))]
        self._translated: dict[tuple[str, ...], tuple[str, list[Kernel]]] = {}
        self._libraries: dict[tuple[tuple[str, ...], bool, bool], ctypes.CDLL] = {}

    def _group(self, name: str) -> tuple[str, ...]:
        """Kernels that are built together with this one.

        Those are all kernels of a small module. Of a large one they are those that share variables with it.
        """
        functions = self.ptx.functions
        if sum(len(f.body) for f in functions.values()) <= 4000:
            return tuple(self.kernels)
        uses = lambda f: any(v in o for s in f.body for o in s.operands for v in self._shared)
        if not any(uses(f) for f in functions.values() if not f.entry) and not uses(functions[name]):
            return (name,)
        return tuple(n for n in self.kernels if uses(functions[n]) or n == name)

    def translated(self, name: str) -> tuple[str, list[Kernel]]:
        group = self._group(name)
        if group not in self._translated:
            self._translated[group] = translate(self.ptx, group)
        return self._translated[group]

    def library(self, name: str, races: bool, profile: bool) -> ctypes.CDLL:
        key = (self._group(name), races, profile)
        if key not in self._libraries:
            flags = [*FLAGS, f"-DPTX_RACES={int(races)}", f"-DPTX_PROFILE={int(profile)}"]
            self._libraries[key] = ctypes.CDLL(str(compile_module(self.translated(name)[0], flags)))
        return self._libraries[key]

    def variable(self, name: str, races: bool = False, profile: bool = False) -> int:
        """Address of a .global or .const variable. Builds with other checks have variables of their own."""
        users = [n for n in self.kernels if any(name in o for s in self.ptx.functions[n].body for o in s.operands)]
        symbol = "v_" + re.sub(r"\W", "_S", name)
        library = self.library((users or self.kernels)[0], races, profile)
        return ctypes.addressof(ctypes.c_uint8.in_dll(library, symbol))

    def kernel(self, name: str) -> LaunchableKernel:
        if name not in self.kernels:
            raise PtxError(f"expected a kernel of the module, got {name!r}; it has: {', '.join(self.kernels)}")
        kernels = self.translated(name)[1]
        index = [k.name for k in kernels].index(name)
        return LaunchableKernel(self, index, kernels[index])

    def error(self, launch: Launch, kernel: str) -> LaunchError:
        line = launch.line
        return LaunchError(
            launch.message.decode(errors="replace"),
            kernel,
            tuple(launch.at_block),
            tuple(launch.at_thread),
            line,
            self.locations.get(line),
        )


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge ranges that overlap, since tensors may share storage."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if result and begin < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif end > begin:
            result.append((begin, end))
    return result


def tensor_range(tensor: Any, guard: bool) -> tuple[int, int]:
    """Addresses of a tensor's storage, or with `guard` those from its first element to its last."""
    if not guard:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def u32s(values: Sequence[int] | None) -> Any:
    """Convert to a C array of uint32_t; None becomes a null pointer."""
    return None if values is None else (ctypes.c_uint32 * len(values))(*values)


def triple(n: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (n,) if isinstance(n, int) else tuple(n)
    return (*sizes, 1, 1, 1)[:3]  # type: ignore[return-value]


class LaunchableKernel:
    """Kernel of a module."""

    def __init__(self, module: CompiledModule, index: int, info: Kernel) -> None:
        self.module, self.index, self.info = module, index, info

    def entry(self, races: bool, profile: bool) -> Any:
        """C function that runs a Launch; builds the module if that has not been done."""
        return getattr(self.module.library(self.info.name, races, profile), f"launch_{self.index}")

    @property
    def threads(self) -> str:
        """Number of threads that a block may have, in words."""
        required = self.info.required_threads
        return f"exactly {required}" if required else f"at most {self.info.max_threads or 1024}"

    def pack(self, args: Sequence[Any], guard: bool) -> tuple[bytes, list[tuple[int, int]]]:
        """Pack arguments into the parameter buffer; return it with the memory of the tensors among them."""
        if len(args) != len(self.info.params):
            kinds = ", ".join(p.type for _, p in self.info.params)
            raise PtxError(f"{self.info.name}: expected {len(self.info.params)} arguments ({kinds}), got {len(args)}")
        buffer, ranges = bytearray(self.info.param_bytes), []
        for arg, (offset, param) in zip(args, self.info.params, strict=True):
            if hasattr(arg, "data_ptr"):
                ranges.append(tensor_range(arg, guard))
                arg = arg.data_ptr()
            size, is_float = param.bytes, param.type in ("f32", "f64")
            if isinstance(arg, (bytes, bytearray)):
                data = bytes(arg)
            elif isinstance(arg, float) and param.type[0] in "us":
                raise PtxError(f"{self.info.name}, {param.name}: expected an integer ({param.type}), got {arg}")
            elif isinstance(arg, float) or (isinstance(arg, int) and is_float):
                data = bytes({4: ctypes.c_float, 8: ctypes.c_double}[size](arg))
            elif isinstance(arg, (bool, int)):
                data = (int(arg) & (1 << 8 * size) - 1).to_bytes(size, "little")
            elif isinstance(arg, ctypes.Structure):
                data = bytes(arg)
            else:
                fits = "a tensor, an int, a float, bytes or a ctypes.Structure"
                raise PtxError(f"{self.info.name}, {param.name}: expected {fits}, got {type(arg).__name__}")
            if len(data) != size:
                raise PtxError(f"{self.info.name}, {param.name}: expected {size} bytes, got {len(data)}")
            buffer[offset : offset + size] = data
        return bytes(buffer), ranges

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        order: Order = "forward",
        asynchrony: Asynchrony = "early",
        seed: int = 0,
        races: bool = False,
        profile: bool = False,
        guard: bool = False,
        memory: Sequence[Any] | None = (),
        resident: int = 1,
        cluster: int = 1,
        spin_limit: int = 1000,
        blocks: Sequence[int] | None = None,
    ) -> Result:
        """Run the kernel on a grid of blocks. Raises LaunchError if it does what a kernel must not do.

        Args:
            grid: number of blocks, in one to three dimensions.
            block: number of threads of a block, in one to three dimensions.
            args: an argument for each parameter. A tensor is passed by its address; a struct as bytes.
            shared_bytes: dynamic shared memory of a block.
            order: which thread, and which block, runs first.
            asynchrony: when asynchronous copies land. "late" is the last moment that the program allows; until then the
                target holds NaN.
            seed: seed of random orders.
            races: report accesses of the same memory that nothing orders.
            profile: count memory traffic, bank conflicts and instructions.
            guard: let a tensor own what its view covers, rather than its whole storage.
            memory: tensors, or (begin, end), that the kernel reaches by other ways than its arguments; None lifts the
                check of bounds.
            resident: how many blocks run at a time.
            cluster: blocks, neighbours in the grid's first dimension, that form a cluster.
            spin_limit: rounds of waiting in vain after which a loop counts as endless.
            blocks: indices in the grid of the blocks that run; None runs all.
        """
        limits = (2**31 - 1, 65_535, 65_535)
        if any(n > most for n, most in zip(triple(grid), limits, strict=True)):
            raise PtxError(f"{self.info.name}: expected a grid of at most {limits} blocks, got {triple(grid)}")
        if not 1 <= cluster <= 8 or triple(grid)[0] % cluster:
            raise PtxError(
                f"{self.info.name}: expected clusters of at most 8 blocks that divide the grid, got {cluster} of "
                f"{triple(grid)}"
            )
        buffer, ranges = self.pack(args, guard)
        ranges += [m if isinstance(m, tuple) else tensor_range(m, guard) for m in memory or ()]
        table = [Range(*r) for r in merged(ranges)]
        params = ctypes.create_string_buffer(len(buffer) + 64)
        # A tensor map among the parameters must lie at a multiple of 64.
        address = align_up(ctypes.addressof(params), 64)
        ctypes.memmove(address, buffer, len(buffer))
        counters = (LineProfile * self.module.lines)() if profile else None
        launch = Launch(
            grid=triple(grid),
            block=triple(block),
            cluster=cluster,
            dynamic_shared=shared_bytes,
            order=ORDERS[order],
            asynchrony=ASYNCHRONY[asynchrony],
            resident=resident,
            check_bounds=memory is not None,
            spin_limit=spin_limit,
            seed=seed,
            params=address,
            param_bytes=len(buffer),
            ranges=(Range * len(table))(*table),
            range_count=len(table),
            blocks=u32s(blocks),
            block_count=len(blocks or ()),
            profile=counters,
        )
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if not 0 < threads <= (self.info.max_threads or 1024) or threads != (self.info.required_threads or threads):
            raise PtxError(f"{self.info.name}: expected blocks of {self.threads} threads, got {threads}")
        self.entry(races, profile)(ctypes.byref(launch))
        if launch.failed:
            raise self.module.error(launch, self.info.name)
        return Result(
            self.info.name,
            launch.warning_count,
            launch.warning.decode(errors="replace"),
            Profile(self.module.ptx.functions[self.info.name].body, counters) if counters else None,
        )


@cache
def _load(text: str) -> CompiledModule:
    return CompiledModule(text)


def load(source: str | os.PathLike[str]) -> CompiledModule:
    """Load a module from PTX text, or from the path of a .ptx file.

    Raises:
        PtxError: the file is no text, or what it says cannot be executed.
    """
    if isinstance(source, str) and "\n" in source:
        return _load(source)
    try:
        return _load(Path(source).read_text())
    except UnicodeDecodeError:
        raise PtxError(f"expected the text of a .ptx file, got bytes that are none: {source}") from None


def tensor_map(tensor: Any, box: Sequence[int], swizzle: int = 128) -> bytes:
    """Encode a CUtensorMap as cuTensorMapEncodeTiled of the stand-in does.

    Args:
        tensor: strided, with an innermost stride of 1.
        box: sizes of the box that is copied, in the tensor's order of dimensions.
        swizzle: 32, 64 or 128 bytes, or 0 for none.
    """
    rank, size = tensor.dim(), tensor.element_size()
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(s * size % 16 for s in tensor.stride()[:-1]):
        strides = tuple(s * size for s in tensor.stride())
        raise PtxError(
            "expected an innermost stride of 1, and an address and outer strides that are multiples of 16 bytes, as a "
            f"tensor map needs; got address {tensor.data_ptr():#x}, strides of {strides} bytes; copy the tensor"
        )
    pad = [0] * (5 - rank)
    header = struct.pack("<I4B", 0x70616D54, rank, size, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], 0)
    dims = struct.pack("<6Q", tensor.data_ptr(), *reversed(tensor.shape), *pad)
    strides = struct.pack("<5Q", *(s * size for s in reversed(tensor.stride())), *pad)
    boxes = struct.pack("<5H5B", *reversed(box), *pad, *([1] * rank), *pad)
    return (header + dims + strides + boxes).ljust(128, b"\0")
