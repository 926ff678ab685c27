"""The verbs in native code for this processor (csrc/cpu)."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..layout import Bundle, Matrices
from ..newton_schulz import Square
from . import eager

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Choice:
    isa: str
    products: Literal["native", "torch"]


_forced: _Choice | None = None


@cache
def _native() -> ModuleType | None:
    try:
        from muon_kernels import _C
    except ImportError:
        return None
    return _C


def instruction_sets() -> list[str]:
    """The instruction sets that kernels were built for and this processor has, best first."""
    native = _native()
    if native is None:
        return []
    return [name for name, isa in native.cpu.Isa.__members__.items() if native.cpu.isa_supported(isa)]


@cache
def _best() -> _Choice:
    native, isas = _native(), instruction_sets()
    assert native is not None and isas
    # torch multiplies bf16 on AMX tiles several times faster than AVX-512 can.
    return _Choice(os.environ.get("MUON_KERNELS_CPU_ISA", isas[0]), "torch" if native.cpu.has_amx_bf16() else "native")


def _choice() -> _Choice:
    return _forced or _best()


@contextmanager
def forced(isa: str, products: Literal["native", "torch"] = "native") -> Iterator[None]:
    """Run with another choice than this processor's best, for tests and measurements."""
    global _forced
    before, _forced = _forced, _Choice(isa, products)
    try:
        yield
    finally:
        _forced = before


def unavailable() -> str | None:
    """See `Backend.unavailable`."""
    if _native() is None:
        return (
            "the compiled module is missing; install muon_kernels with a C++17 compiler (g++ or clang++) on PATH, "
            "and with pip's -e if Python starts in its source directory"
        )
    isas = instruction_sets()
    if not isas:
        return "this processor has neither AVX-512-BF16 nor AVX2; use backend='eager'"
    wanted = os.environ.get("MUON_KERNELS_CPU_ISA", isas[0])
    if wanted not in isas:
        # Not a reason: "auto" would pass over it in silence.
        raise ValueError(
            f"MUON_KERNELS_CPU_ISA should be one of {', '.join(map(repr, isas))}, which this processor and build have, "
            f"or unset, but is: {wanted!r}"
        )
    return None


def refuses(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """See `Backend.refuses`."""
    if device.type != "cpu":
        return f"expected tensors on the CPU, got {device}; use backend='auto'"
    bad = [d for d in dtypes if d not in _DTYPES]
    return f"expected float32 or bfloat16 tensors, got {bad[0]}; use backend='auto'" if bad else None


def describe() -> str:
    """See `Backend.describe`."""
    choice, native = _choice(), _native()
    assert native is not None
    products = "torch (AMX)" if choice.products == "torch" else "native"
    return f"{choice.isa}, products {products}, threads {native.cpu.thread_runtime()}"


def symmetric_products() -> bool:
    """See `Backend.symmetric_products`."""
    return _choice().products == "native"


def precise_squares() -> bool:
    """See `Products.precise_squares`."""
    return _choice().products == "native"


def default_workspace_bytes() -> int:
    """64 MiB: a few large matrices at a time stay in the last-level cache."""
    return 64 << 20


def leading_dimension(cols: int) -> int:
    """Keep rows apart that a power-of-two stride would map to the same few sets of the first-level cache."""
    return cols + 32 if cols and cols % 512 == 0 else cols


def _stack(t: Tensor | None) -> tuple[int, int, int, int, int, int] | None:
    if t is None:
        return None
    return (t.data_ptr(), *t.shape, t.stride(0), t.stride(1))


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _refs(matrices: Sequence[Matrices]) -> array[int]:
    """The addresses and strides of all matrices as csrc's MatrixRef[]."""
    if isinstance(matrices, Bundle) and "refs" in matrices.derived:
        return cast("array[int]", matrices.derived["refs"])
    numbers: list[int] = []
    size = matrices[0].tensor.element_size()
    for tensor, (batch, _, _, offset, batch_stride, row_stride, col_stride, _) in matrices:
        first = tensor.data_ptr() + offset * size
        if batch == 1:  # the gradients of many small parameters are worth a short way
            numbers += first, row_stride, col_stride
            continue
        for i in range(batch):
            numbers += first + i * batch_stride * size, row_stride, col_stride
    refs = array("q", numbers)
    if isinstance(matrices, Bundle):
        matrices.derived["refs"] = refs
    return refs


def _address(refs: array[int] | array[float]) -> int:
    return refs.buffer_info()[0]


def _isa_and_threads() -> tuple[object, int]:
    native = _native()
    assert native is not None
    return getattr(native.cpu.Isa, _choice().isa), torch.get_num_threads()


def _dtype(matrices: Sequence[Matrices]) -> object:
    native = _native()
    assert native is not None
    return getattr(native.DType, _DTYPES[matrices[0].tensor.dtype])


def _momentum_update(
    grads: Sequence[Matrices],
    momenta: Sequence[Matrices] | None,
    X: Tensor,
    scale: Tensor,
    momentum: float,
    nesterov: bool,
    dampened: bool,
    grad_scale: float,
    eps: float,
    margin: float,
) -> tuple[object, object]:
    """csrc's MomentumUpdate, and what must live as long."""
    native = _native()
    assert native is not None
    refs = _refs(grads), _refs(momenta) if momenta is not None else array("q")
    update = native.MomentumUpdate(
        _address(refs[0]),
        _dtype(grads),
        _address(refs[1]) if momenta is not None else 0,
        _dtype(momenta if momenta is not None else grads),
        _stack(X),
        scale.data_ptr(),
        eps,
        margin,
        grad_scale,
        momentum,
        nesterov,
        dampened,
    )
    return update, refs


def momentum_update(
    grads: Sequence[Matrices],
    momenta: Sequence[Matrices] | None,
    X: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    dampened: bool,
    grad_scale: float,
    eps: float,
    margin: float,
) -> Tensor:
    """See `Backend.momentum_update`."""
    native = _native()
    assert native is not None
    scale = torch.empty(X.shape[0], dtype=torch.float32)
    update, _alive = _momentum_update(grads, momenta, X, scale, momentum, nesterov, dampened, grad_scale, eps, margin)
    native.cpu.momentum_update(*_isa_and_threads(), update)
    return scale


def _product(
    A: Square,
    B: Square,
    out: Square,
    *,
    transposed: bool = False,
    symmetric: bool = False,
    C: Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    native = _native()
    assert native is not None
    product = native.Product(
        _stack(A.high),
        _pointer(A.diagonal),
        _stack(B.high),
        transposed,
        _pointer(B.diagonal),
        _stack(C.high) if C else None,
        _pointer(C.diagonal) if C else 0,
        _stack(out.high),
        _pointer(out.diagonal),
        symmetric,
        alpha,
        beta,
        gamma,
        _pointer(scale),
    )
    if _queue.products is None:
        native.cpu.products(*_isa_and_threads(), [product])
    else:
        _queue.products.append(product)
        _queue.operands.append((A, B, C, out, scale))


class _Queue(threading.local):
    """Products of this thread that wait for the end of `fused`, and what must live until then."""

    products: list[object] | None = None
    operands: list[object]


_queue = _Queue()


@contextmanager
def _queued() -> Iterator[list[object]]:
    """Collects products instead of running them."""
    products: list[object] = []
    _queue.products, _queue.operands = products, []
    try:
        yield products
    finally:
        _queue.products, _queue.operands = None, []


@contextmanager
def fused() -> Iterator[None]:
    """See `Backend.fused`."""
    native = _native()
    assert native is not None
    with _queued() as products:
        yield
        native.cpu.products(*_isa_and_threads(), products)


def syrk(
    A: Tensor | Square,
    *,
    out: Square,
    C: Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """See `Products.syrk`."""
    if _choice().products == "torch":
        eager.syrk(A, out=out, C=C, alpha=alpha, beta=beta, gamma=gamma, scale=scale)
        return
    A = A if isinstance(A, Square) else Square(A)
    _product(A, A, out, transposed=True, symmetric=True, C=C, alpha=alpha, beta=beta, gamma=gamma, scale=scale)


def syrkx(A: Square, B: Square, *, out: Square) -> None:
    """See `Products.syrkx`."""
    if _choice().products == "torch":
        eager.syrkx(A, B, out=out)
        return
    _product(A, B, out, symmetric=True)


def gemm(
    A: Square,
    X: Tensor,
    *,
    out: Tensor,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """See `Products.gemm`."""
    if _choice().products == "torch":
        eager.gemm(A, X, out=out, C=C, alpha=alpha, beta=beta, scale=scale)
        return
    _product(A, Square(X), Square(out), C=None if C is None else Square(C), alpha=alpha, beta=beta, scale=scale)


def _apply_update(
    params: Sequence[Matrices], X: Tensor, lr: float | Tensor, weight_decay: float | Tensor, ratios: Sequence[float]
) -> tuple[object, object]:
    """csrc's ApplyUpdate, and what must live as long."""
    native = _native()
    assert native is not None
    refs, factors = _refs(params), ratios if isinstance(ratios, array) else array("d", ratios)
    update = native.ApplyUpdate(
        _address(refs), _dtype(params), _stack(X), float(lr), float(weight_decay), _address(factors)
    )
    return update, (refs, factors)


def apply_update(
    params: Sequence[Matrices], X: Tensor, *, lr: float | Tensor, weight_decay: float | Tensor, ratios: Sequence[float]
) -> None:
    """See `Backend.apply_update`."""
    native = _native()
    assert native is not None
    update, _alive = _apply_update(params, X, lr, weight_decay, ratios)
    native.cpu.apply_update(*_isa_and_threads(), update)
    torch.autograd.graph.increment_version([p.tensor for p in params])


def fused_slots(rows: int, cols: int, count: int) -> int | None:
    """One for each thread, where there are enough matrices to keep all busy to the end."""
    threads = torch.get_num_threads()
    return threads if _choice().products == "native" and count >= 4 * threads else None


class _Program(NamedTuple):
    """The products of a fused step, which are the same in every step, and what they read and write."""

    X: Tensor
    scale: Tensor
    products: list[object]
    result: Tensor
    operands: list[object]


def fused_step(
    params: Sequence[Matrices],
    grads: Sequence[Matrices],
    momenta: Sequence[Matrices],
    X: Tensor,
    iterate: Callable[[Tensor], Tensor],
    *,
    momentum: float,
    nesterov: bool,
    dampened: bool,
    grad_scale: float,
    eps: float,
    margin: float,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    ratios: Sequence[float],
) -> None:
    """See `Backend.fused_step`."""
    native = _native()
    assert native is not None
    program = params.derived.get("program") if isinstance(params, Bundle) else None
    if program is None or program.X is not X:
        scale = torch.empty(X.shape[0], dtype=torch.float32)
        with _queued() as products:
            program = _Program(X, scale, products, iterate(scale), _queue.operands)
        if isinstance(params, Bundle):
            params.derived["program"] = program
    before, _alive = _momentum_update(
        grads, momenta, X, program.scale, momentum, nesterov, dampened, grad_scale, eps, margin
    )
    after, _also_alive = _apply_update(params, program.result, lr, weight_decay, ratios)
    native.cpu.fused_step(*_isa_and_threads(), len(ratios), before, program.products, after)
    torch.autograd.graph.increment_version([p.tensor for p in params])
