"""The verbs in Triton, compiled for the GPU at hand: NVIDIA's from compute capability 8.0 on, AMD's, Intel's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..layout import Matrices
from ..newton_schulz import Square, square
from ..triton_kernels import configs
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate, Step
from . import Fused, eager
from .gpu import default_workspace_bytes as default_workspace_bytes
from .gpu import fusing_pays
from .gpu import leading_dimension as leading_dimension
from .gpu import precise_squares as precise_squares
from .gpu import symmetric_products as symmetric_products
from .terms import terms_needed

_OLDEST = (3, 4)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Facts, see `Backend`.
device_types = ("cuda", "xpu")
normalizes = False


@cache
def _kernels(name: str) -> ModuleType:
    """Import a module of triton_kernels, and triton with it."""
    return import_module(f"..triton_kernels.{name}", __package__)


class _Device:
    """The device of tensors and launches. Tests put another in its place, whose launches an emulator executes."""

    types: tuple[str, ...] = ("cuda", "xpu")  # AMD's are "cuda" too, in torch

    def unavailable(self) -> str | None:
        """Implement `Backend.unavailable`."""
        missing = []
        if not any(getattr(torch, type_).is_available() for type_ in self.types):
            missing.append(
                f"torch {torch.__version__} finds no GPU; install a build of torch for it and check its driver"
            )
        if find_spec("triton") is None:
            missing.append("triton is missing; a build of torch for a GPU brings it, or pip install triton")
        return ", and ".join(missing) or _triton_unfit()

    def target(self) -> int | str:
        """Return 10 times the compute capability of the current device, or its architecture's name."""
        from triton.runtime import driver

        return cast("int | str", driver.active.get_current_target().arch)

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        """Return (major, minor) of an NVIDIA GPU, None for others."""
        if device.type != "cuda" or torch.version.hip is not None:
            return None
        return torch.cuda.get_device_capability(device)

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make `device` the current one."""
        return cast(AbstractContextManager[Any], getattr(torch, device.type).device(device))


_device = _Device()


@cache
def _triton_unfit() -> str | None:
    """Return why triton, which is installed, cannot work here; None if it can."""
    import triton

    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        return f"triton {triton.__version__} is too old; upgrade torch to one that brings {needed} or newer"
    try:
        from triton import knobs
        from triton.runtime import driver

        directory = Path(knobs.cache.dir).absolute()
        driver.active.get_current_target()
    except Exception as error:  # it builds a part of itself when it is first asked for
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return (
            f"triton {triton.__version__} cannot reach the GPU ({why}); check the driver with nvidia-smi or rocm-smi, "
            "that gcc or clang is on PATH or in CC, and that TRITON_CACHE_DIR can be written"
        )
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return f"triton cannot write its cache {directory}; set TRITON_CACHE_DIR to a directory that can be written"
    return None


@contextmanager
def _launching(shape: Sequence[int], device: torch.device) -> Iterator[None]:
    """Let errors inside say what was stepped."""
    try:
        with _device.guard(device):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        count, rows, cols = shape
        raise RuntimeError(f"{error}, for {count} of {rows}x{cols} on {device}") from None


def unavailable() -> str | None:
    """Implement `Backend.unavailable`."""
    return _device.unavailable()


def refuses(device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
    """Implement `Backend.refuses`."""
    if device.type not in _device.types:
        return f"expected tensors on a GPU, got {device}; use backend='auto'"
    if bad := [d for d in dtypes if d not in _DTYPES]:
        return f"expected float32, bfloat16 or float16 tensors, got {bad[0]}; use backend='auto'"
    if (capability := _device.capability(device)) is not None and capability < (8, 0):
        return "expected compute capability 8.0 or more, {} has {}.{}; use backend='auto'".format(device, *capability)
    return None


def prefers_instead(device: torch.device, rows: int, cols: int) -> None:
    """Return None: the backend that Triton is preferred to says so itself."""


def remarks(device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
    """Say where products are not ours, and whether tiles were measured."""
    with _device.guard(device):
        table, shipped = _kernels("measured").table(), _kernels("measured").shipped()
    notes = []
    m, n = shape
    if configs.vendor(configs.Shape(1, m, n, m, False), table):
        notes.append(f"of {m}x{n}, products with the matrices themselves are left to the GPU vendor's library")
    if table != shipped:
        notes.append("triton's tiles are those that python -m muon_kernels tune measured on this GPU")
    return tuple(notes)


def describe() -> str:
    """Implement `Backend.describe`."""
    import triton

    return f"Triton {triton.__version__}, compiled for the GPU at hand"


def program(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Implement `Backend.program`: repeat the launches without the way to them."""
    recorded: tuple[list[Callable[[], None]], Tensor] = _kernels("launch").recorded(run)
    launches, result = recorded

    def again() -> Tensor:
        with _launching(result.shape, result.device):
            for launch in launches:
                launch()
        return result

    return again


def rehearsal() -> AbstractContextManager[None]:
    """Implement `Backend.rehearsal`."""
    return cast(AbstractContextManager[None], _kernels("launch").rehearsal())


def _written(tensors: Sequence[Matrices]) -> None:
    if not _kernels("launch").rehearsing():
        torch.autograd.graph.increment_version([t.tensor for t in tensors])


def _product(A: Square, B: Square, out: Square, C: Square | None = None, **options: Any) -> None:
    with _launching(out.high.shape, out.high.device):
        _kernels("products").product(
            A.high,
            B.high,
            out.high,
            a_diagonal=A.diagonal,
            b_diagonal=B.diagonal,
            c=C.high if C else None,
            c_diagonal=C.diagonal if C else None,
            out_diagonal=out.diagonal,
            **options,
        )


def then(run: Callable[[], object], operands: Sequence[Tensor]) -> None:
    """Implement `Products.then`."""
    _kernels("launch").do(run, rehearse=lambda: None)


def syrk(A: Tensor | Square, *, out: Square, **options: Any) -> None:
    """Implement `Products.syrk`."""
    A = square(A)
    _product(A, A, out, b_transposed=True, symmetric=True, **options)


def syrkx(A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
    """Implement `Products.syrkx`."""
    _product(A, B, out, symmetric=True, gamma=gamma)


def gemm(
    A: Square, X: Tensor | Square, *, out: Tensor | Square, C: Tensor | Square | None = None, **options: Any
) -> None:
    """Implement `Products.gemm`."""
    _product(A, square(X), square(out), None if C is None else square(C), **options)


def add(A: Square, *, out: Square, C: Square | None = None, **options: Any) -> None:
    """Implement `Products.add`, by torch's operations."""
    then(partial(eager.add, A, out=out, C=C, **options), [out.high, A.high])


def momentum_update(args: MomentumUpdate) -> Tensor:
    """Implement `Backend.momentum_update`. In scratch: the sums of squares of all tiles, and the scales."""
    with _launching(args.x.shape, args.x.device):
        scale: Tensor = _kernels("elementwise").momentum_update(args)
    if args.momentum is not None:
        _written(args.momentum)
    return scale


def apply_update(args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
    """Implement `Backend.apply_update`."""
    with _launching(args.x.shape, args.x.device):
        _kernels("elementwise").apply_update(args, options)
    _written(args.param)


def scratch_bytes(rows: int, cols: int) -> int:
    """Return that of `triton_kernels.configs`."""
    return configs.scratch_bytes(rows, cols)


def update_launches(count: int) -> int:
    """Count momentum, norms and update."""
    return 3


def product_tiles() -> tuple[int, int]:
    """Return the smallest and the largest of all tables."""
    sides = [side for table in configs.TABLES.values() for c in table.configs for side in (c.block_m, c.block_n)]
    return min(sides), max(sides)


def fused_plan(
    rows: int,
    cols: int,
    count: int,
    schedule: Schedule,
    stochastic_rounding: bool = False,
    room: int | None = None,
) -> Fused | None:
    """Fuse where the smaller side fits on the chip, which needs no workspace but two visits to the longer one.

    Not where few wide matrices would leave most of the chip idle. It rounds to nearest.
    """
    terms = terms_needed(schedule.triples, schedule.margin)
    if stochastic_rounding or terms is None or not 0 < rows <= configs.FUSED_ROWS:
        return None
    if not fusing_pays(rows, cols, count):
        return None
    return Fused(slots=0, flops=configs.executed_flops(rows, cols, len(schedule.triples), terms), reads=2)


def fused_step(args: Step) -> None:
    """Implement `Backend.fused_step`. The iteration is the kernel's own."""
    momentum, param = args.momentum, args.apply.param
    assert momentum.momentum is not None
    terms = terms_needed(tuple(args.triples), momentum.margin)
    with _launching((len(args.apply.ratio), *momentum.x.shape[1:]), param[0].tensor.device):
        _kernels("fused_step").fused_step(args, terms)
    _written([*param, *momentum.momentum])
