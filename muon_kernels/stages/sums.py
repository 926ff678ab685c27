"""Sums of squares of stacks, and products with factors, in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements that are copied to fp32 at a time. On a processor they stay in its cache. torch's operations on two dtypes
# would need no copy but are ten times slower.
BLOCK, BLOCK_ON_CPU = 1 << 20, 1 << 18


# Smallest sum of squares that is divided by: smaller ones count as zero.
TINY = torch.finfo(torch.float32).tiny


def in_cache(device: torch.device) -> bool:
    """Whether it pays on this device to go over a stack block by block."""
    return device.type == "cpu"


def padded(numbers: int) -> int:
    """Round up to whole cache lines of fp32."""
    return -(-numbers // 16) * 16


def floats_of_block(m: int, n: int, device: torch.device) -> int:
    """Return the number of elements in the largest block of an m x n matrix."""
    return padded(min(m * n, max(n, BLOCK_ON_CPU if in_cache(device) else BLOCK)))


def in_blocks(X: Tensor, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Yield (matrices, rows) of X, block by block of at most `numbers` elements."""
    batch, m, n = X.shape
    if not X.numel():
        return
    rows = max(1, min(numbers, BLOCK_ON_CPU if in_cache(X.device) else BLOCK) // n)
    matrices = max(1, rows // m)
    for i in range(0, batch, matrices):
        for row in range(0, m, rows):
            yield slice(i, i + matrices), slice(row, row + rows)


def in_fp32(X: Tensor, scratch: Tensor) -> Tensor:
    """Return a contiguous fp32 copy of X in the beginning of `scratch`."""
    return scratch[: X.numel()].view(X.shape).copy_(X)


def sums_of_squares(X: Tensor, dim: int | tuple[int, int], out: Tensor, partial: Tensor, scratch: Tensor) -> None:
    """Write the sums of X² along `dim`, which is -1, -2 or (-2, -1) and stays with size 1, to `out`.

    `partial`, of the size of `out`, is overwritten, and so is `scratch`, fp32. On a processor a row or a column has the
    same sum whatever stands beside it: ranks that hold some of them have the bits of one process.
    """
    if not in_cache(X.device):
        torch.linalg.vector_norm(X, dim=dim, keepdim=True, dtype=torch.float32, out=out)
        out.square_()
        return
    out.zero_()
    if dim == -2:  # by columns, to add their rows in an order that torch.sum does not have: it depends on the place
        turned = X.mT
        for matrices, cols in in_blocks(turned, scratch.numel()):
            out[matrices, :, cols].copy_(_sum_of_rows(in_fp32(X[matrices, :, cols], scratch).square_()))
        return
    for matrices, rows in in_blocks(X, scratch.numel()):
        own = matrices, rows if dim == -1 else slice(None)
        add_sum(in_fp32(X[matrices, rows], scratch).square_(), dim, out[own], partial[own])


def _sum_of_rows(x: Tensor) -> Tensor:
    """Return the sums over the rows of every matrix, (batch, 1, n), in the place of its first row."""
    rows = x.shape[1]
    while rows > 1:
        half = rows // 2
        x[:, :half].add_(x[:, rows - half : rows])
        rows -= half
    return x[:, :1]


def add_sum(x: Tensor, dim: int | tuple[int, int], out: Tensor, partial: Tensor) -> None:
    """Add the sums of `x` along `dim` to `out`; `partial` is scratch of the same size."""
    torch.sum(x, dim, keepdim=True, out=partial)
    out.add_(partial)


def multiply(X: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Multiply X by an fp32 factor, rounding once."""
    if not in_cache(X.device):
        X.mul_(factor)
        return
    for matrices, rows in in_blocks(X, scratch.numel()):
        own = factor[matrices, rows if factor.shape[1] > 1 else slice(None)]
        X[matrices, rows].copy_(in_fp32(X[matrices, rows], scratch).mul_(own))


def norm_kept(before: Tensor, after: Tensor) -> Tensor:
    """Return the factor that restores each matrix's norm, from its sums of squares before and after.

    Zero gives 0; NaN stays NaN. Both arguments are overwritten.
    """
    return before.div_(after.clamp_(min=TINY)).sqrt_()
