"""The products of the eager backend, in torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import memory
from ..newton_schulz import Factors, Square, square

if TYPE_CHECKING:
    from typing_extensions import Unpack


@cache
def emulates(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a 16-bit dtype on such a device without instructions for it.

    Only processors are asked. torch hands 16-bit products to oneDNN where the answer of its operator is yes; that one
    still emulates bf16 on AVX-512 without AVX-512-BF16, which `get_capabilities` tells from torch 2.8 on.
    """
    if device_type != "cpu" or dtype.itemsize != 2:
        return False
    operator = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
    takes: bool = getattr(torch.ops.mkldnn, operator, bool)()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(capabilities.get(name, True) for name in ("avx512_bf16", "amx_bf16"))
    return not takes or (dtype == torch.bfloat16 and not has)


def groups(matrices: Tensor) -> list[slice]:
    """Cut a stack into groups of so many matrices that intermediate results stay small, at least one."""
    count = max(1, memory.piece(matrices.device) // max(1, matrices.shape[1] * matrices.shape[2]))
    return [slice(i, i + count) for i in range(0, len(matrices), count)]


def _product(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    C: Tensor | None,
    *,
    squared: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """scale·(alpha·A·B + beta·C + gamma·I), with the square of scale if `squared`."""
    # On the CPU, torch 2.13 takes beta for 0 where alpha is 0, or writes nothing.
    native = not emulates(out.device.type, out.dtype) and alpha != 0
    if native and not gamma:
        if not memory.rehearsing():
            torch.baddbmm(out if C is None else C, A, B, beta=0 if C is None else beta, alpha=alpha, out=out)
        if scale is None:
            return
    for at in groups(max(A, B, out, key=Tensor.numel)):
        C_at, scale_at = (None if t is None else t[at] for t in (C, scale))
        _product_in_fp32(A[at], B[at], out[at], C_at, alpha, beta, gamma, scale_at, squared, native)


def _product_in_fp32(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    scale: Tensor | None,
    squared: bool,
    native: bool,
) -> None:
    """`_product` as far as torch's 16-bit one, if it is `native`, has not done it."""
    fp32, none = torch.float32, torch.Size([0])
    total, addend, rounded, left, right, factor = memory.take(
        out.device,
        (out.shape, fp32),
        (none if C is None else out.shape, fp32),
        (out.shape, out.dtype),
        (none if native else A.shape, fp32),
        (none if native else B.shape, fp32),
        (out.shape[:1], fp32),
    )
    if memory.rehearsing():
        return
    if native and not gamma:
        total.copy_(out)
    else:
        if alpha == 0:
            total.zero_()
        elif native:
            torch.bmm(A, B, out=rounded)
            total.copy_(rounded).mul_(alpha)
        else:
            torch.bmm(left.copy_(A), right.copy_(B), out=total)
            if gamma:
                total.copy_(rounded.copy_(total))
            total.mul_(alpha)
        if C is not None and beta:
            total.add_(addend.copy_(C), alpha=beta)
        if gamma:  # the identity must not be added to a rounded sum: in fp32, which torch's product cannot return
            total.diagonal(dim1=-2, dim2=-1).add_(gamma)
        elif scale is not None and alpha != 0:  # as the native product rounds
            total.copy_(rounded.copy_(total))
    if scale is not None:
        total.mul_((torch.mul(scale, scale, out=factor) if squared else scale)[:, None, None])
    out.copy_(total)


def then(run: Callable[[], object], operands: Sequence[Tensor]) -> None:
    """Implement `Products.then`."""
    run()


def syrk(A: Tensor | Square, *, out: Square, C: Square | None = None, **factors: Unpack[Factors]) -> None:
    """Implement `Products.syrk`."""
    A = square(A).high
    _product(A, A.mT, out.high, None if C is None else C.high, squared=True, **factors)


def syrkx(A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
    """Implement `Products.syrkx`."""
    _product(A.high, B.high, out.high, None, gamma=gamma)


def gemm(
    A: Square,
    X: Tensor | Square,
    *,
    out: Tensor | Square,
    C: Tensor | Square | None = None,
    **factors: Unpack[Factors],
) -> None:
    """Implement `Products.gemm`."""
    addend = None if C is None else square(C).high
    _product(A.high, square(X).high, square(out).high, addend, **factors)


def add(
    A: Square,
    *,
    out: Square,
    C: Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """Implement `Products.add`, for the GPU backends too."""
    if gamma or out.diagonal is not None:
        _add_precisely(A, out, C, alpha, beta, gamma, scale)
        return
    if scale is None and (C is None or (C.high is out.high and beta == 1)):
        if not memory.rehearsing():
            torch.mul(A.high, alpha, out=out.high) if C is None else out.high.add_(A.high, alpha=alpha)
        return
    for at in groups(out.high):
        total, addend = memory.take(out.high.device, *[(out.high[at].shape, torch.float32)] * 2)
        if memory.rehearsing():
            return
        if C is None:
            total.copy_(A.high[at]).mul_(alpha)
        else:
            total.copy_(C.high[at]).mul_(beta).add_(addend.copy_(A.high[at]), alpha=alpha)
        out.high[at].copy_(total if scale is None else total.mul_(scale[at, None, None]))


def _add_precisely(
    A: Square, out: Square, C: Square | None, alpha: float, beta: float, gamma: float, scale: Tensor | None
) -> None:
    """`add` where the diagonal is kept in fp32."""
    on_diagonal = alpha * _diagonal(A) + (gamma if C is None else gamma + beta * _diagonal(C))
    total = A.high.float().mul_(alpha)
    if C is not None:
        total.add_(C.high, alpha=beta)
    if scale is not None:
        on_diagonal *= scale[:, None]
        total *= scale[:, None, None]
    out.high.copy_(total)
    rounded = out.high.diagonal(dim1=1, dim2=2)
    rounded.copy_(on_diagonal)
    if out.diagonal is not None:
        torch.sub(on_diagonal, rounded.float(), out=out.diagonal)


def _diagonal(S: Square) -> Tensor:
    on_diagonal = S.high.diagonal(dim1=1, dim2=2).float()
    return on_diagonal if S.diagonal is None else on_diagonal + S.diagonal
