"""Checks of batched products, whoever computes them; the operands that they are asked with.

A `Run` computes one product: run(a, b, out, **options) with the options of csrc/muon_kernels.h's Product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..newton_schulz import Square
from . import Wrong, agree, require, within

Run = Callable[..., Any]
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
_OUTSIDE = 77.0


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return small integers: every partial sum is exact in fp32, so a result can only differ by its one rounding."""
    return torch.randint(-2, 3, shape).to(dtype)


def symmetric(batch: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return symmetric matrices of small integers."""
    upper = integers(batch, m, m, dtype=dtype).triu()
    return upper + upper.triu(1).mT


def commuting(batch: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return two symmetric matrices of small integers whose product is symmetric."""
    signs = torch.randint(0, 2, (batch, m, 1)).float() * 2 - 1
    first, second = (x * torch.eye(m) + y * signs * signs.mT for x, y in ((2.0, 1.0), (-3.0, 2.0)))
    return first.to(dtype), second.to(dtype)


def placed(t: Tensor, width: int = 16, outside: float = float("nan")) -> Tensor:
    """Return a copy inside a block of `outside` whose rows can be cut into pieces of `width` bytes and of no more."""
    batch, rows, cols = t.shape
    offset = width // 2 if width < 16 else 8
    row_stride = -(-(cols + 2 * offset) // 8) * 8 + (offset if width < 16 else 0)
    block = torch.full((batch * (rows + 2) * row_stride + 8,), outside, dtype=t.dtype)
    block = block[(16 - block.data_ptr() % 16) % 16 // 2 :]
    strides = ((rows + 2) * row_stride, row_stride, 1)
    return block.as_strided(t.shape, strides, block.storage_offset() + row_stride + offset).copy_(t)


def empty(batch: int, m: int, n: int, dtype: torch.dtype = torch.bfloat16, width: int = 16) -> Tensor:
    """Return an output full of NaN among sentinels, see `untouched`."""
    return placed(torch.full((batch, m, n), torch.nan, dtype=dtype), width, _OUTSIDE)


def untouched(out: Tensor) -> bool:
    """Whether all sentinels around an `empty` are left."""
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    inside = torch.zeros(len(whole), dtype=torch.bool)
    inside.as_strided(out.shape, out.stride(), out.storage_offset())[:] = True
    return bool((whole[~inside] == _OUTSIDE).all())


def exact(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """Return the product in float64."""
    return a.double() @ (b.double().mT if transposed else b.double())


def of_backend(ops: Backend) -> Run:
    """Return a `Run` of a backend's verbs, for the products that these can ask for."""

    def run(
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        c: Tensor | None = None,
        b_transposed: bool = False,
        symmetric: bool = False,
        a_diagonal: Tensor | None = None,
        b_diagonal: Tensor | None = None,
        c_diagonal: Tensor | None = None,
        out_diagonal: Tensor | None = None,
        **factors: Any,
    ) -> None:
        A, B, to = Square(a, a_diagonal), Square(b, b_diagonal), Square(out, out_diagonal)
        C = None if c is None else A if c is a else B if c is b else Square(c, c_diagonal)
        if b_transposed:
            ops.syrk(A, C=C, out=to, **factors)
        elif symmetric:
            ops.syrkx(A, B, out=to, **factors)
        else:
            ops.gemm(A, B, C=C, out=to, **factors)

    return run


def twice(run: Run) -> Run:
    """Return a `Run` that makes every product twice, with outputs full of NaN before, and requires equal bits."""

    def again(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        written = [t for t in (out, options.get("out_diagonal")) if t is not None]
        run(a, b, out, **options)
        first = [t.clone() for t in written]
        for t in written:
            t.fill_(torch.nan)
        run(a, b, out, **options)
        for one, other in zip(first, written, strict=True):
            require(torch.equal(one.nan_to_num(), other.nan_to_num()), "the same product again has other bits")

    return again


def _whole(out: Tensor, right: Tensor, what: str) -> None:
    """Require an `empty` to be exactly `right`, and nothing beside it to be written."""
    agree(out, right.to(out.dtype), what)
    require(untouched(out), f"{what}: elements beside the result were written")


def any_shape(run: Run, batch: int, m: int, n: int, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
    """Require syrk, gemm and syrkx to be exact on integers, and nothing beside the results to be touched."""
    X, out = placed(integers(batch, m, n, dtype=dtype), width), empty(batch, m, m, dtype, width)
    run(X, X, out, b_transposed=True, symmetric=True)
    _whole(out, exact(X, X, True), "X Xᵀ")
    A, C = placed(integers(batch, m, m, dtype=dtype), width), placed(integers(batch, m, n, dtype=dtype), width)
    out = empty(batch, m, n, dtype, width)
    run(A, X, out, c=C, beta=-4.0)
    _whole(out, A.double() @ X.double() - 4 * C.double(), "A X - 4 C")
    A, B = (placed(t, width) for t in commuting(batch, m, dtype))
    out = empty(batch, m, m, dtype, width)
    run(A, B, out, symmetric=True)
    _whole(out, A.double() @ B.double(), "A B, symmetric")


def one_less_aligned(run: Run, which: str, width: int) -> None:
    """Require a product of whose operands one is aligned to `width` bytes only to be exact."""
    at = {"a": 16, "b": 16, "c": 16, "out": 16, which: width}
    A, X, C = (
        placed(integers(2, *shape), at[name]) for name, shape in (("a", (20, 30)), ("b", (30, 70)), ("c", (20, 70)))
    )
    out = empty(2, 20, 70, width=at["out"])
    run(A, X, out, c=C, beta=3.0)
    _whole(out, A.double() @ X.double() + 3 * C.double(), f"A X + 3 C, {which} at {width} bytes")


def odd_distance_of_matrices(run: Run) -> None:
    """Require matrices that are an odd number of elements apart to be multiplied exactly."""

    def block(t: Tensor) -> Tensor:
        return torch.full((2, 2077), torch.nan).bfloat16().as_strided(t.shape, (2077, 64, 1), 8).copy_(t)

    A, X, out = block(integers(2, 20, 30)), block(integers(2, 30, 40)), block(torch.zeros(2, 20, 40))
    run(A, X, out)
    agree(out, exact(A, X, False).bfloat16(), "A X")


def _on_diagonal(t: Tensor) -> Tensor:
    return t.diagonal(dim1=-2, dim2=-1)


def _parts(out: Tensor, diagonal: Tensor, sums: Tensor, what: str) -> None:
    """Require `out` to be `sums`, rounded, and `diagonal` to be what rounding took from its diagonal."""
    _whole(out, sums.float(), what)
    agree(_on_diagonal(out.double()) + diagonal.double(), _on_diagonal(sums), f"{what}, in fp32 on the diagonal")


def parts_of_squares(run: Run, m: int, width: int, dtype: torch.dtype) -> None:
    """Require corrections of diagonals to count, of any size, so that none can be lost or counted twice unseen."""

    def square() -> tuple[Tensor, Tensor, Tensor]:
        """Return a matrix, the correction of its diagonal, and their sum."""
        matrix, diagonal = placed(symmetric(3, m, dtype), width), integers(3, m).float()
        return matrix, diagonal, matrix.double() + diagonal.double().diag_embed()

    def check(what: str, sums: Tensor, **keywords: Any) -> None:
        """Require the lower triangle of `sums`, mirrored, rounded, with what rounding took from the diagonal."""
        out, diagonal = empty(3, m, m, dtype, width), torch.full((3, m), torch.nan)
        run(out=out, out_diagonal=diagonal, symmetric=True, **keywords)
        _parts(out, diagonal, sums.tril() + sums.tril(-1).mT, what)

    (A, of_a, a), (B, of_b, b), (C, of_c, c) = square(), square(), square()
    check("A B", a @ b, a=A, b=B, a_diagonal=of_a, b_diagonal=of_b)
    scale = torch.tensor([1.0, 0.5, 2.0])
    eye, scales = torch.eye(m), scale[:, None, None]
    squared = dict(a=A, b=A, b_transposed=True, a_diagonal=of_a, b_diagonal=of_a, scale=scale)
    factors = dict(alpha=2.0, beta=-4.0, gamma=8.0)
    check("A² - 4 C", scales**2 * (2 * a @ a.mT - 4 * c + 8 * eye), c=C, c_diagonal=of_c, **squared, **factors)
    check("A² - 4 A", scales**2 * (2 * a @ a.mT - 4 * a + 8 * eye), c=A, c_diagonal=of_a, **squared, **factors)
    out, diagonal = empty(3, m, m, dtype, width), torch.full((3, m), torch.nan)
    diagonals = dict(a_diagonal=of_a, b_diagonal=of_b, c_diagonal=of_c, out_diagonal=diagonal)
    run(A, B, out, c=C, beta=-4.0, gamma=8.0, **diagonals)
    _parts(out, diagonal, a @ b - 4 * c + 8 * eye, "A B - 4 C")  # of which nobody says that it is symmetric
    for n in (m, m + 9):
        X, Y = (placed(integers(3, m, n, dtype=dtype), width) for _ in range(2))
        for of in (X, Y):  # added to the product, or another matrix
            out = empty(3, m, n, dtype, width)
            run(A, X, out, a_diagonal=of_a, c=of, alpha=2.0, beta=-4.0, scale=scale)
            _whole(out, (scales * (2 * a @ X.double() - 4 * of.double())).float(), "(A + diagonal) X - 4 C")


def precise_squares(run: Run, m: int) -> None:
    """Require the diagonal to make up for its rounding, and to count in products."""

    def square(**keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, diagonal = empty(2, m, m), torch.full((2, m), torch.nan)
        run(out=out, out_diagonal=diagonal, symmetric=True, **keywords)
        return out, diagonal, out.double() + diagonal.double().diag_embed()

    def near(value: Tensor, right: Tensor, share: float, what: str) -> None:
        within(_on_diagonal(value), _on_diagonal(right), share * _on_diagonal(right).abs(), what)

    X = placed(torch.randn(2, m, 2 * m).bfloat16())
    R, of_r, r = square(a=X, b=X, b_transposed=True, alpha=1 / m, gamma=100.0)
    near(r, X.double() @ X.double().mT / m + 100 * torch.eye(m), 2**-15, "diagonal of X Xᵀ + 100 I")
    _, _, w = square(a=R, b=R, a_diagonal=of_r, b_diagonal=of_r)
    near(w, r @ r, 2e-5, "diagonal of R R")
    both = dict(a_diagonal=of_r, b_diagonal=of_r, c_diagonal=of_r)
    _, _, s = square(a=R, b=R, c=R, b_transposed=True, alpha=0.5, beta=-2.0, gamma=3.0, **both)
    near(s, 0.5 * r @ r - 2 * r + 3 * torch.eye(m), 2e-5, "diagonal of R² - 2 R + 3 I")


def without_columns(run: Run, m: int) -> None:
    """Require only the addends of a product of nothing."""
    X, C = torch.empty(2, m, 0).bfloat16(), placed(symmetric(2, m))
    out = empty(2, m, m)
    run(X, X, out, b_transposed=True, symmetric=True, c=C, beta=2.0, gamma=3.0)
    _whole(out, 2 * C.double() + 3 * torch.eye(m), "2 C + 3 I")
    run(torch.empty(2, m, 0).bfloat16(), torch.empty(2, 0, m).bfloat16(), out)
    agree(out, torch.zeros(2, m, m).bfloat16(), "a product of nothing")


def nan_stays_in_its_matrix(run: Run) -> None:
    """Require a NaN to spoil its own matrix only."""
    X = torch.randn(3, 33, 65).bfloat16()
    X[1, 4, 64] = torch.nan
    out = torch.empty(3, 33, 33, dtype=torch.bfloat16)
    run(X, X, out, b_transposed=True, symmetric=True)
    require(bool(out[1].isnan().any()), "a NaN is lost")
    require(bool(out[::2].isfinite().all()), "a NaN is in other matrices than its own")


def result_is_symmetric(run: Run) -> None:
    """Require the lower triangle, mirrored, even of a product that is not symmetric."""
    A, B = (placed(torch.randn(2, 200, 200).bfloat16()) for _ in range(2))
    out = empty(2, 200, 200)
    run(A, B, out, symmetric=True)
    agree(out, out.mT, "a symmetric result and its transpose")
    lower = (A.double() @ B.double()).tril()
    within(out.tril(), lower, 2**-8 * lower.abs() + 1e-3, "lower triangle")


def one_rounding(run: Run, batch: int, m: int, n: int, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
    """Require |out - exact| ≤ u |exact| + (k + 4) 2^-24 (Σ|a||b| + |c|): one rounding of a sum in fp32."""

    def normal(*shape: int) -> Tensor:
        return placed(torch.randn(shape).to(dtype), width)

    alpha, beta = torch.tensor([0.3, 1.7]).tolist()  # as fp32 has them
    X, A, of_m, of_n = normal(batch, m, n), normal(batch, m, m), normal(batch, m, m), normal(batch, m, n)
    of_m.copy_(of_m + of_m.mT)
    for a, b, c, transposed in ((X, X, of_m, True), (A, X, of_n, False)):
        out = empty(batch, m, c.shape[2], dtype, width)
        run(a, b, out, b_transposed=transposed, symmetric=transposed, c=c, alpha=alpha, beta=beta)
        right = alpha * exact(a, b, transposed) + beta * c.double()
        size = alpha * exact(a.abs(), b.abs(), transposed) + beta * c.double().abs()
        bound = UNIT_ROUNDOFF[dtype] * right.abs() + (a.shape[2] + 4) * 2**-24 * size + 2**-25  # f16 has subnormals
        within(out, right, bound, "α X Xᵀ + β C" if transposed else "α A X + β C")
        require(not transposed or torch.equal(out, out.mT), "α X Xᵀ + β C is not symmetric to the bit")


def roughly(run: Run, batch: int, m: int, n: int, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
    """Require what a vendor's library may make of `one_rounding`'s products: it adds sums that it has rounded."""
    X, A = (placed(torch.randn(batch, m, k).to(dtype), width) for k in (n, m))
    for a, b, transposed in ((X, X, True), (A, X, False)):
        out = empty(batch, m, m if transposed else n, dtype, width)
        run(a, b, out, b_transposed=transposed, symmetric=transposed)
        right, size = exact(a, b, transposed), exact(a.abs(), b.abs(), transposed)
        within(out, right, 4 * UNIT_ROUNDOFF[dtype] * size, "X Xᵀ" if transposed else "A X")
        require(untouched(out), "elements beside the result were written")


def diagonal_bias(run: Run, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """Return mean and largest relative error of the fp32 diagonal of X Xᵀ, in units of 2^-24.

    Tensor cores truncate their sums, of which there is one for 16 of k, and all terms are positive here: about k/16
    units, of one sign. More than four times as many are `Wrong`.
    """
    X = torch.randn(1, m, k).to(dtype)
    out, diagonal = empty(1, m, m, dtype), torch.full((1, m), torch.nan)
    run(X, X, out, b_transposed=True, symmetric=True, alpha=1 / k, out_diagonal=diagonal)
    right = X.double().square().sum(2) / k
    error = (_on_diagonal(out.double()) + diagonal.double() - right) / right * 2**24
    mean, largest = float(error.mean()), float(error.abs().max())
    if not largest <= k / 4 + 16:
        raise Wrong(f"diagonal of X Xᵀ, k = {k}: expected errors up to {k / 4 + 16:.0f}·2^-24, got {largest:.0f}")
    return mean, largest
