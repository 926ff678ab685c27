"""The verbs in native code for this processor (csrc/cpu)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..coefficients import Schedule
from ..layout import Bundle
from ..newton_schulz import Factors, Square, square
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate, Step
from . import Fused, native

if TYPE_CHECKING:
    from typing_extensions import Unpack

_forced: str | None = None


# Facts, see `Backend`.
device_types = ("cpu",)
symmetric_products = True
precise_squares = True
normalizes = False
default_workspace_bytes = 64 << 20  # a few large matrices at a time stay in the last-level cache


def instruction_sets() -> list[str]:
    """The instruction sets that kernels were built for and this processor has, fastest first."""
    _C = native.module()
    return [] if _C is None else [isa.name for isa in _C.cpu.instruction_sets()]


@cache
def _best() -> str:
    return os.environ.get("MUON_KERNELS_CPU_ISA") or instruction_sets()[0]


def _isa() -> str:
    return _forced or _best()


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """Run with another instruction set than this processor's best, for tests and measurements."""
    global _forced
    before, _forced = _forced, isa
    try:
        yield
    finally:
        _forced = before


def unavailable() -> str | None:
    """Implement `Backend.unavailable`."""
    if native.module() is None:
        return (
            "the compiled module is missing; install muon_kernels with a C++17 compiler (g++ or clang++) on PATH, "
            "and with pip's -e if Python starts in its source directory"
        )
    isas = instruction_sets()
    if not isas:
        return f"kernels need AVX2 or AVX-512, this processor ({os.uname().machine}) has neither; use backend='eager'"
    wanted = os.environ.get("MUON_KERNELS_CPU_ISA") or isas[0]
    if wanted not in isas:
        # Not a reason: "auto" would pass over it in silence.
        raise ValueError(
            f"MUON_KERNELS_CPU_ISA should be one of {', '.join(map(repr, isas))}, which this processor and build have, "
            f"or unset, but is: {wanted!r}"
        )
    return None


def refuses(device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
    """Implement `Backend.refuses`."""
    if device.type != "cpu":
        return f"expected tensors on the CPU, got {device}; use backend='auto'"
    if workspace_dtype != torch.bfloat16:
        return f"expected workspace_dtype torch.bfloat16, got {workspace_dtype}; use backend='eager'"
    bad = [d for d in dtypes if d not in (torch.float32, torch.bfloat16)]
    return f"expected float32 or bfloat16 tensors, got {bad[0]}; use backend='auto'" if bad else None


def prefers_instead(device: torch.device, rows: int, cols: int) -> None:
    """Return None: no other backend is faster on a processor."""


def remarks(device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
    """Return none: there is nothing to remark."""
    return ()


def rehearsal() -> AbstractContextManager[None]:
    """Return a context that takes memory: all is compiled already. See memory.py."""
    return memory.rehearsal()


def describe() -> str:
    """Implement `Backend.describe`."""
    return f"{_isa()}, threads {native.required().cpu.thread_runtime()}"


def leading_dimension(cols: int) -> int:
    """Keep rows apart that a power-of-two stride would map to the same few sets of the first-level cache.

    Even, so that the fp32 diagonals behind the stacks are aligned.
    """
    return cols + 32 if cols and cols % 512 == 0 else cols + cols % 2


def _isa_and_threads() -> tuple[object, int]:
    _C = native.required()
    return getattr(_C.cpu.Isa, _isa()), torch.get_num_threads()


def momentum_update(args: MomentumUpdate) -> Tensor:
    """Implement `Backend.momentum_update`."""
    _C, batch = native.required(), args.x.shape[0]
    if args.scratch is None:
        scale = torch.empty(batch, dtype=torch.float32, device="cpu")
    else:
        scale = args.scratch.view(torch.float32)[:batch]
    update, _alive = native.momentum_update(_C, args, scale)
    if not memory.rehearsing():
        _C.cpu.momentum_update(*_isa_and_threads(), update)
    return scale


def _run(products: list[object], _operands: list[object]) -> None:
    if not memory.rehearsing():
        native.required().cpu.products(*_isa_and_threads(), products)


_queue = native.Queue(_run)


def program(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Implement `Backend.program`."""
    return _queue.program(run)


then = _queue.then


def _product(A: Square, B: Square | None, out: Square, **options: Any) -> None:
    _queue.product(native.required(), A, B, out, **options)


def syrk(A: Tensor | Square, *, out: Square, C: Square | None = None, **factors: Unpack[Factors]) -> None:
    """Implement `Products.syrk`."""
    A = square(A)
    _product(A, A, out, transposed=True, symmetric=True, C=C, **factors)


def syrkx(A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
    """Implement `Products.syrkx`."""
    _product(A, B, out, symmetric=True, gamma=gamma)


def gemm(
    A: Square,
    X: Tensor | Square,
    *,
    out: Tensor | Square,
    C: Tensor | Square | None = None,
    **options: Any,
) -> None:
    """Implement `Products.gemm`."""
    _product(A, square(X), square(out), C=None if C is None else square(C), **options)


def add(A: Square, *, out: Square, C: Square | None = None, **options: Any) -> None:
    """Implement `Products.add`."""
    _product(A, None, out, C=C, **options)


def _apply_options(options: ApplyOptions) -> tuple[object, object]:
    """Return csrc's ApplyOptions and what must live as long; the same again, where there are no numbers to point to."""
    return native.apply_options(native.required(), options) if options.stochastic_rounding else _to_nearest(options)


@lru_cache(maxsize=2)
def _to_nearest(options: ApplyOptions) -> tuple[object, object]:
    return native.apply_options(native.required(), options)


def apply_update(args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
    """Implement `Backend.apply_update`."""
    if memory.rehearsing():
        return
    _C = native.required()
    update, _alive = native.apply_update(_C, args, args.x, float(args.lr), float(args.weight_decay))
    chosen, _also_alive = _apply_options(options)
    _C.cpu.apply_update(*_isa_and_threads(), update, chosen)
    torch.autograd.graph.increment_version([p.tensor for p in args.param])


def scratch_bytes(rows: int, cols: int) -> int:
    """Return the size of the scale."""
    return 8


def update_launches(count: int) -> int:
    """Count one each."""
    return 2


def product_tiles() -> None:
    """Return None: panels suit the caches of a processor."""


def fused_plan(
    rows: int,
    cols: int,
    count: int,
    schedule: Schedule,
    stochastic_rounding: bool = False,
    room: int | None = None,
) -> Fused | None:
    """Give each thread a slot, where there are enough matrices to keep all threads busy to the end."""
    threads = torch.get_num_threads()
    return Fused(threads) if count >= 4 * threads else None


class _Program(NamedTuple):
    """Products of a fused step, which are the same in every step, with what they read and write."""

    X: Tensor
    scale: Tensor
    products: list[object]
    result: Tensor
    operands: list[object]


def fused_step(args: Step) -> None:
    """Implement `Backend.fused_step`."""
    _C, momentum, apply = native.required(), args.momentum, args.apply
    derived = apply.param.derived if isinstance(apply.param, Bundle) else {}
    program = derived.get("program")
    if program is None or program.X is not momentum.x:
        scale = torch.empty(momentum.x.shape[0], dtype=torch.float32, device="cpu")
        with _queue.collect() as (products, operands):
            program = _Program(momentum.x, scale, products, args.iterate(scale), operands)
        derived["program"] = program
    if memory.rehearsing():
        return
    before, _alive = native.momentum_update(_C, momentum, program.scale)
    after, _also_alive = native.apply_update(_C, apply, program.result, float(apply.lr), float(apply.weight_decay))
    options, _alive_too = _apply_options(args.options)
    _C.cpu.fused_step(*_isa_and_threads(), len(apply.ratio), before, program.products, after, options)
    torch.autograd.graph.increment_version([p.tensor for p in apply.param])
