"""Shared parts of the backends in compiled code: the module, and torch's operands as csrc takes them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from ..layout import refs
from ..newton_schulz import Square
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate


@cache
def module() -> ModuleType | None:
    """Return muon_kernels._C, or None if it was not built."""
    try:
        from muon_kernels import _C
    except ImportError:
        return None
    return _C


def required() -> ModuleType:
    """Return muon_kernels._C, which must be there."""
    _C = module()
    assert _C is not None
    return _C


def built_with() -> str:
    """Describe the compiled module."""
    _C = module()
    if _C is None:
        return "nothing: the compiled module is missing"
    if not hasattr(_C, "cuda"):
        some = "kernels" if _C.cpu.instruction_sets() else "no kernels"
        return f"{some} for this kind of processor, none for GPUs"
    capabilities = ", ".join(f"{a[:-1]}.{a[-1]}" if a.isdigit() else a for a in _C.cuda.architectures.split())
    return f"CUDA {_C.cuda.version}, for compute capabilities {capabilities}"


DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def dtype(_C: ModuleType, of: torch.dtype) -> object:
    """Return csrc's DType."""
    return getattr(_C.DType, DTYPES[of])


_NO_STACK = (0,) * 6


def stack(t: Tensor | None) -> tuple[int, int, int, int, int, int] | None:
    """Return the fields of csrc's Stack."""
    if t is None:
        return None
    return (t.data_ptr(), *t.shape, t.stride(0), t.stride(1))


def pointer(t: Tensor | None) -> int:
    """Return an address, 0 for None."""
    return 0 if t is None else t.data_ptr()


def address(numbers: array[int] | array[float]) -> int:
    """Return the address of an array, good as long as the array lives."""
    return numbers.buffer_info()[0]


def momentum_update(_C: ModuleType, args: MomentumUpdate, scale: Tensor | None) -> tuple[object, object]:
    """Return csrc's MomentumUpdate, without x if there is no scale, and what must live as long."""
    momentum = args.momentum
    at_grads, at_momenta = refs(args.grad), array("q") if momentum is None else refs(momentum)
    update = _C.MomentumUpdate(
        address(at_grads),
        dtype(_C, args.grad[0].tensor.dtype),
        0 if momentum is None else address(at_momenta),
        dtype(_C, (args.grad if momentum is None else momentum)[0].tensor.dtype),
        _NO_STACK if scale is None else stack(args.x),
        pointer(scale),
        pointer(args.norm),
        args.eps,
        args.margin,
        args.grad_scale,
        args.mu,
        args.nesterov,
        args.dampened,
    )
    return update, (at_grads, at_momenta)


def apply_update(
    _C: ModuleType, args: ApplyUpdate, x: Tensor | None, lr: float, weight_decay: float
) -> tuple[object, object]:
    """Return csrc's ApplyUpdate of another x and of numbers, and what must live as long."""
    at_params, ratio = refs(args.param), args.ratio if isinstance(args.ratio, array) else array("d", args.ratio)
    update = _C.ApplyUpdate(
        address(at_params),
        dtype(_C, args.param[0].tensor.dtype),
        stack(x) or _NO_STACK,
        lr,
        weight_decay,
        address(ratio),
    )
    return update, (at_params, ratio)


def apply_options(_C: ModuleType, options: ApplyOptions, lr: int = 0, weight_decay: int = 0) -> tuple[object, object]:
    """Return csrc's ApplyOptions, with addresses of numbers on the device, and what must live as long."""
    *plain, number, (top, left, cols, turned) = options
    numbers = number if number is None or isinstance(number, array) else array("i", number)
    at = 0 if numbers is None else address(numbers)
    return _C.ApplyOptions(lr, weight_decay, *plain, at, top, left, cols or 0, turned), numbers


class Queue(threading.local):
    """Products, run one by one or, of a `program`, all together.

    `run` is given csrc's Products and the operands, (A, B, C, out, scale), of each. `prepare`, if there is one, is
    given the same by a program, and returns what runs them.
    """

    def __init__(
        self,
        run: Callable[[list[object], list[object]], None],
        prepare: Callable[[list[object], list[object]], Callable[[], object]] | None = None,
    ) -> None:
        self._run = run
        self._prepare = prepare or (lambda products, operands: partial(run, products, operands))
        self._waiting: list[object] | None = None
        self._operands: list[object] = []
        self._parts: list[Callable[[], object]] = []

    @contextmanager
    def collect(self) -> Iterator[tuple[list[object], list[object]]]:
        """Put the products inside on a list instead of running them; yield it with what must live as long."""
        waiting: list[object] = []
        operands: list[object] = []
        self._waiting, self._operands = waiting, operands
        try:
            yield waiting, operands
        finally:
            self._waiting, self._operands = None, []

    def program(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Implement `Backend.program`."""
        parts: list[Callable[[], object]] = []
        self._parts = parts
        with self.collect():
            result = run()
            self._cut()

        def again() -> Tensor:
            for part in parts:
                part()
            return result

        return again

    def _cut(self) -> None:
        """Make the products on the list a part of the program and begin a new list."""
        if self._waiting:
            self._parts.append(self._prepare(self._waiting, self._operands))
            self._waiting, self._operands = [], []

    def then(self, run: Callable[[], object], operands: Sequence[Tensor]) -> None:
        """Implement `Products.then`; not inside `collect`, whose products follow one another."""
        if self._waiting is None:
            run()
        else:
            self._cut()
            self._parts.append(run)

    def product(
        self,
        _C: ModuleType,
        A: Square,
        B: Square | None,
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
        """Run one of csrc's Products, or put it on the list."""
        product = _C.Product(
            stack(A.high),
            pointer(A.diagonal),
            stack(B.high) if B else None,
            transposed,
            pointer(B.diagonal) if B else 0,
            stack(C.high) if C else None,
            pointer(C.diagonal) if C else 0,
            stack(out.high),
            pointer(out.diagonal),
            symmetric,
            alpha,
            beta,
            gamma,
            pointer(scale),
        )
        if self._waiting is None:
            self._run([product], [(A, B, C, out, scale)])
        else:
            self._waiting.append(product)
            self._operands.append((A, B, C, out, scale))
