"""The verbs in Triton, for NVIDIA GPUs of compute capability 8.0 and up and for AMD's that have matrix cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..layout import Matrices
from ..newton_schulz import Square

_OLDEST = (3, 4)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels(name: str) -> ModuleType:
    """A module of triton_kernels, which imports triton."""
    return import_module(f"..triton_kernels.{name}", __package__)


class _Device:
    """Where tensors and launches go. Tests put another one in its place, whose launches an emulator executes."""

    type = "cuda"  # AMD's too, in torch

    def unavailable(self) -> str | None:
        """See `Backend.unavailable`."""
        if find_spec("triton") is None:
            return "triton is missing; pip install triton"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU; install a build of torch for it and check its driver"
        import triton

        if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
            needed = ".".join(map(str, _OLDEST))
            return f"triton {triton.__version__} is too old; upgrade torch to one that brings {needed} or newer"
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        """(major, minor)."""
        return torch.cuda.get_device_capability(device)

    def guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make it the current device."""
        return torch.cuda.device(device)


_device = _Device()


def unavailable() -> str | None:
    """See `Backend.unavailable`."""
    return _device.unavailable()


def refuses(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """See `Backend.refuses`."""
    if device.type != _device.type:
        return f"expected tensors on a GPU, got {device}; use backend='auto'"
    if bad := [d for d in dtypes if d not in _DTYPES]:
        return f"expected float32, bfloat16 or float16 tensors, got {bad[0]}; use backend='auto'"
    if torch.version.hip is None and (capability := _device.capability(device)) < (8, 0):
        return "expected compute capability 8.0 or more, {} has {}.{}; use backend='auto'".format(device, *capability)
    return None


def describe() -> str:
    """See `Backend.describe`."""
    return "Triton, compiled for the GPU at hand"


def symmetric_products() -> bool:
    """See `Backend.symmetric_products`."""
    return True


def precise_squares() -> bool:
    """See `Products.precise_squares`."""
    return True


def default_workspace_bytes() -> int:
    """1 GiB."""
    return 1 << 30


def leading_dimension(cols: int) -> int:
    """Rows that begin at 16 bytes, which is what a thread copies at a time."""
    return -(-cols // 8) * 8


def fused() -> AbstractContextManager[None]:
    """Products are launched one by one: nothing is gained by waiting."""
    return nullcontext()


def _product(A: Square, B: Square, out: Square, C: Square | None = None, **options: Any) -> None:
    with _device.guard(out.high.device):
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


def syrk(A: Tensor | Square, *, out: Square, **options: Any) -> None:
    """See `Products.syrk`."""
    A = A if isinstance(A, Square) else Square(A)
    _product(A, A, out, b_transposed=True, symmetric=True, **options)


def syrkx(A: Square, B: Square, *, out: Square) -> None:
    """See `Products.syrkx`."""
    _product(A, B, out, symmetric=True)


def gemm(A: Square, X: Tensor, *, out: Tensor, C: Tensor | None = None, **options: Any) -> None:
    """See `Products.gemm`."""
    _product(A, Square(X), Square(out), None if C is None else Square(C), **options)


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
    options: dict[str, Any] = dict(momentum=momentum, nesterov=nesterov, dampened=dampened)
    options |= dict(grad_scale=grad_scale, eps=eps, margin=margin)
    with _device.guard(X.device):
        scale: Tensor = _kernels("elementwise").momentum_update(grads, momenta, X, **options)
    if momenta is not None:
        torch.autograd.graph.increment_version([b.tensor for b in momenta])
    return scale


def apply_update(
    params: Sequence[Matrices], X: Tensor, *, lr: float | Tensor, weight_decay: float | Tensor, ratios: Sequence[float]
) -> None:
    """See `Backend.apply_update`."""
    with _device.guard(X.device):
        _kernels("elementwise").apply_update(params, X, lr=lr, weight_decay=weight_decay, ratios=ratios)
    torch.autograd.graph.increment_version([p.tensor for p in params])


def update_launches() -> int:
    """Momentum, its norms, update."""
    return 3


def fused_slots(rows: int, cols: int, count: int) -> int | None:
    """See `Backend.fused_slots`."""
    slots: int | None = _kernels("fused_step").fused_slots(rows, cols, count)
    return slots


def fused_step(
    params: Sequence[Matrices],
    grads: Sequence[Matrices],
    momenta: Sequence[Matrices],
    X: Tensor,
    iterate: Callable[[Tensor], Tensor],
    **options: Any,
) -> None:
    """See `Backend.fused_step`."""
    with _device.guard(params[0].tensor.device):
        _kernels("fused_step").fused_step(params, grads, momenta, X, iterate, **options)
    torch.autograd.graph.increment_version([t.tensor for t in (*params, *momenta)])
