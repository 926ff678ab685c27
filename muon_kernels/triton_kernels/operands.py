"""Operands of a product, and whether they fit together."""

from __future__ import annotations

import torch
from torch import Tensor


def require(fits: bool) -> None:
    """Raise unless the operands fit together."""
    if not fits:
        raise ValueError("shapes, strides or dtypes of a product's operands do not fit together")


def fit(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    diagonals: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: Tensor | None,
    b_transposed: bool,
    symmetric: bool,
) -> bool:
    """Whether shapes, strides and dtypes of a product's operands are those that `products.product` documents.

    `diagonals` are a's, b's, c's and that of the result.
    """
    batch, m, n = out.shape
    k = a.shape[2]
    stacks = [t for t in (a, b, c, out) if t is not None]
    a_diagonal, b_diagonal, c_diagonal, out_diagonal = diagonals
    vectors = [t for t in (*diagonals, scale) if t is not None]
    return (
        a.shape == (batch, m, k)
        and b.shape == ((batch, n, k) if b_transposed else (batch, k, n))
        and (c is None or c.shape == out.shape)
        and (not symmetric or m == n)
        and (a_diagonal is None or (a_diagonal.shape == (batch, m) and m == k and (not b_transposed or k == n)))
        and (b_diagonal is None or (b_diagonal.shape == (batch, n) and k == n))
        and all(d is None or (d.shape == (batch, m) and m == n) for d in (c_diagonal, out_diagonal))
        and (scale is None or scale.shape == (batch,))
        and out.dtype in (torch.bfloat16, torch.float16)
        and all(
            t.dtype == out.dtype
            and (t.stride(2) == 1 or t.shape[2] < 2)
            and (t.stride(1) >= t.shape[2] or t.shape[1] < 2)
            for t in stacks
        )
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in vectors)
    )
