"""What every batched product must get right, whoever computes it; the operands that it is asked with.

A `Run` computes one product: run(a, b, out, **options) with the options of csrc/muon_kernels.h's Product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checks.vast import far_apart

Run = Callable[..., Any]
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small integers: every partial sum is exact in fp32, so a result can only differ by its one rounding."""
    return torch.randint(-2, 3, shape).to(dtype)


def symmetric(batch: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    upper = integers(batch, m, m, dtype=dtype).triu()
    return upper + upper.triu(1).mT


def commuting(batch: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Two symmetric matrices of small integers whose product is symmetric."""
    signs = torch.randint(0, 2, (batch, m, 1)).float() * 2 - 1
    first, second = (x * torch.eye(m) + y * signs * signs.mT for x, y in ((2.0, 1.0), (-3.0, 2.0)))
    return first.to(dtype), second.to(dtype)


def placed(t: Tensor, width: int = 16, outside: float = float("nan")) -> Tensor:
    """A copy inside a block of `outside` whose rows can be cut into pieces of `width` bytes and of no more."""
    batch, rows, cols = t.shape
    offset = width // 2 if width < 16 else 8
    row_stride = -(-(cols + 2 * offset) // 8) * 8 + (offset if width < 16 else 0)
    block = torch.full((batch * (rows + 2) * row_stride + 8,), outside, dtype=t.dtype)
    block = block[(16 - block.data_ptr() % 16) % 16 // 2 :]
    strides = ((rows + 2) * row_stride, row_stride, 1)
    return block.as_strided(t.shape, strides, block.storage_offset() + row_stride + offset).copy_(t)


def empty(batch: int, m: int, n: int, dtype: torch.dtype = torch.bfloat16, width: int = 16) -> Tensor:
    """An output full of NaN among sentinels, see `untouched`."""
    return placed(torch.full((batch, m, n), torch.nan, dtype=dtype), width, 77.0)


def untouched(out: Tensor) -> bool:
    """Whether all sentinels around an `empty` are left."""
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    inside = torch.zeros(len(whole), dtype=torch.bool)
    inside.as_strided(out.shape, out.stride(), out.storage_offset())[:] = True
    return bool((whole[~inside] == 77).all())


def exact(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return a.double() @ (b.double().mT if transposed else b.double())


def any_shape(run: Run, batch: int, m: int, n: int, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
    """syrk, gemm and syrkx: exact on integers, and nothing beside the results is touched."""
    X, out = placed(integers(batch, m, n, dtype=dtype), width), empty(batch, m, m, dtype, width)
    run(X, X, out, b_transposed=True, symmetric=True)
    assert torch.equal(out, exact(X, X, True).to(dtype)) and untouched(out)
    A, C = placed(integers(batch, m, m, dtype=dtype), width), placed(integers(batch, m, n, dtype=dtype), width)
    out = empty(batch, m, n, dtype, width)
    run(A, X, out, c=C, beta=-4.0)
    assert torch.equal(out, (A.double() @ X.double() - 4 * C.double()).to(dtype)) and untouched(out)
    A, B = (placed(t, width) for t in commuting(batch, m, dtype))
    out = empty(batch, m, m, dtype, width)
    run(A, B, out, symmetric=True)
    assert torch.equal(out, (A.double() @ B.double()).to(dtype)) and untouched(out)


def one_less_aligned(run: Run, which: str, width: int) -> None:
    at = {"a": 16, "b": 16, "c": 16, "out": 16, which: width}
    A, X, C = (
        placed(integers(2, *shape), at[name]) for name, shape in (("a", (20, 30)), ("b", (30, 70)), ("c", (20, 70)))
    )
    out = empty(2, 20, 70, width=at["out"])
    run(A, X, out, c=C, beta=3.0)
    assert torch.equal(out, (A.double() @ X.double() + 3 * C.double()).bfloat16()) and untouched(out)


def odd_distance_of_matrices(run: Run) -> None:
    block = lambda t: torch.full((2, 2077), torch.nan).bfloat16().as_strided(t.shape, (2077, 64, 1), 8).copy_(t)
    A, X, out = block(integers(2, 20, 30)), block(integers(2, 30, 40)), block(torch.zeros(2, 20, 40))
    run(A, X, out)
    assert torch.equal(out, exact(A, X, False).bfloat16())


def parts_of_squares(run: Run, m: int, width: int, dtype: torch.dtype) -> None:
    """Corrections of diagonals of any size, so that none can be lost or counted twice unseen."""

    def square() -> tuple[Tensor, Tensor, Tensor]:
        """A matrix, the correction of its diagonal, and their sum."""
        matrix, diagonal = placed(symmetric(3, m, dtype), width), integers(3, m).float()
        return matrix, diagonal, matrix.double() + diagonal.double().diag_embed()

    def check(sums: Tensor, **keywords: Any) -> None:
        """The result is the lower triangle of `sums`, mirrored, rounded, with what rounding took from the diagonal."""
        out, diagonal = empty(3, m, m, dtype, width), torch.full((3, m), torch.nan)
        run(out=out, out_diagonal=diagonal, symmetric=True, **keywords)
        sums = sums.tril() + sums.tril(-1).mT
        assert torch.equal(out, sums.float().to(dtype)) and untouched(out)
        on_diagonal = out.double().diagonal(dim1=-2, dim2=-1) + diagonal.double()
        assert torch.equal(on_diagonal, sums.diagonal(dim1=-2, dim2=-1))

    (A, of_a, a), (B, of_b, b), (C, of_c, c) = square(), square(), square()
    check(a @ b, a=A, b=B, a_diagonal=of_a, b_diagonal=of_b)
    scale = torch.tensor([1.0, 0.5, 2.0])
    eye, scales = torch.eye(m), scale[:, None, None]
    squared = dict(a=A, b=A, b_transposed=True, a_diagonal=of_a, b_diagonal=of_a, scale=scale)
    factors = dict(alpha=2.0, beta=-4.0, gamma=8.0)
    check(scales**2 * (2 * a @ a.mT - 4 * c + 8 * eye), c=C, c_diagonal=of_c, **squared, **factors)
    check(scales**2 * (2 * a @ a.mT - 4 * a + 8 * eye), c=A, c_diagonal=of_a, **squared, **factors)
    out, diagonal = empty(3, m, m, dtype, width), torch.full((3, m), torch.nan)
    diagonals = dict(a_diagonal=of_a, b_diagonal=of_b, c_diagonal=of_c, out_diagonal=diagonal)
    run(A, B, out, c=C, beta=-4.0, gamma=8.0, **diagonals)
    sums = a @ b - 4 * c + 8 * eye  # of which nobody says that it is symmetric
    assert torch.equal(out, sums.float().to(dtype)) and untouched(out)
    on_diagonal = out.double().diagonal(dim1=-2, dim2=-1) + diagonal.double()
    assert torch.equal(on_diagonal, sums.diagonal(dim1=-2, dim2=-1))
    for n in (m, m + 9):
        X, Y = (placed(integers(3, m, n, dtype=dtype), width) for _ in range(2))
        for of in (X, Y):  # added to the product, or another matrix
            out = empty(3, m, n, dtype, width)
            run(A, X, out, a_diagonal=of_a, c=of, alpha=2.0, beta=-4.0, scale=scale)
            sums = scales * (2 * a @ X.double() - 4 * of.double())
            assert torch.equal(out, sums.float().to(dtype)) and untouched(out)


def precise_squares(run: Run, m: int) -> None:
    """The diagonal makes up for its rounding, and counts in products."""
    on_diagonal = lambda t: t.diagonal(dim1=-2, dim2=-1)

    def square(**keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, diagonal = empty(2, m, m), torch.full((2, m), torch.nan)
        run(out=out, out_diagonal=diagonal, symmetric=True, **keywords)
        return out, diagonal, out.double() + diagonal.double().diag_embed()

    X = placed(torch.randn(2, m, 2 * m).bfloat16())
    R, of_r, r = square(a=X, b=X, b_transposed=True, alpha=1 / m, gamma=100.0)
    right = X.double() @ X.double().mT / m + 100 * torch.eye(m)
    torch.testing.assert_close(on_diagonal(r), on_diagonal(right), rtol=2**-15, atol=0)
    _, _, w = square(a=R, b=R, a_diagonal=of_r, b_diagonal=of_r)
    torch.testing.assert_close(on_diagonal(w), on_diagonal(r @ r), rtol=2e-5, atol=0)
    both = dict(a_diagonal=of_r, b_diagonal=of_r, c_diagonal=of_r)
    _, _, s = square(a=R, b=R, c=R, b_transposed=True, alpha=0.5, beta=-2.0, gamma=3.0, **both)
    right = 0.5 * r @ r - 2 * r + 3 * torch.eye(m)
    torch.testing.assert_close(on_diagonal(s), on_diagonal(right), rtol=2e-5, atol=0)


def without_columns(run: Run, m: int) -> None:
    X, C = torch.empty(2, m, 0).bfloat16(), placed(symmetric(2, m))
    out = empty(2, m, m)
    run(X, X, out, b_transposed=True, symmetric=True, c=C, beta=2.0, gamma=3.0)
    assert torch.equal(out, (2 * C.double() + 3 * torch.eye(m)).bfloat16()) and untouched(out)
    run(torch.empty(2, m, 0).bfloat16(), torch.empty(2, 0, m).bfloat16(), out)
    assert torch.equal(out, torch.zeros(2, m, m).bfloat16())


def nan_stays_in_its_matrix(run: Run) -> None:
    X = torch.randn(3, 33, 65).bfloat16()
    X[1, 4, 64] = torch.nan
    out = torch.empty(3, 33, 33, dtype=torch.bfloat16)
    run(X, X, out, b_transposed=True, symmetric=True)
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()


def offsets_have_64_bits(run: Run) -> None:
    """Rows and matrices four and eight GiB apart, of which only a few pages exist."""
    strides = 2**32 + 64, 2**31 + 8, 1
    A, X, C = (far_apart(integers(2, 2, 2), strides) for _ in range(3))
    out = far_apart(torch.full((2, 2, 2), torch.nan).bfloat16(), strides)
    run(A, X, out, c=C, beta=1.0)
    assert torch.equal(out, (A.double() @ X.double() + C.double()).bfloat16())


MANY = 70_000  # matrices: more than a grid has rows
SOME = [0, 1, 65_535, 65_536, MANY - 1]  # of them, that are executed


def many_matrices(run: Run) -> None:
    """In one launch, of which a few blocks, one a matrix, are executed."""
    X, out = integers(MANY, 2, 8), torch.full((MANY, 2, 2), torch.nan).bfloat16()
    run(X, X, out, b_transposed=True, symmetric=True, blocks=SOME)
    assert torch.equal(out[SOME], exact(X[SOME], X[SOME], True).bfloat16())
    assert int(out.isfinite().sum()) == 4 * len(SOME)


def result_is_symmetric(run: Run) -> None:
    """Even if the product is not: its lower triangle is taken."""
    A, B = (placed(torch.randn(2, 200, 200).bfloat16()) for _ in range(2))
    out = empty(2, 200, 200)
    run(A, B, out, symmetric=True)
    assert torch.equal(out, out.mT)
    lower = (A.double() @ B.double()).tril()
    assert ((out.double().tril() - lower).abs() <= 2**-8 * lower.abs() + 1e-3).all()


def unfit() -> list[dict[str, Any]]:
    """Arguments of products that there are not."""
    A, X, out = torch.ones(2, 8, 8).bfloat16(), torch.ones(2, 8, 9).bfloat16(), torch.ones(2, 8, 9).bfloat16()
    diagonal = torch.ones(2, 9)
    return [
        dict(a=A, b=torch.ones(2, 7, 9).bfloat16(), out=out),
        dict(a=A, b=X[:1], out=out),
        dict(a=A, b=X, out=out, c=A),
        dict(a=A, b=X, out=out, b_transposed=True),
        dict(a=A, b=X, out=out, symmetric=True),
        dict(a=A, b=X, out=out, b_diagonal=diagonal),
        dict(a=A, b=X, out=out, c_diagonal=diagonal),
        dict(a=A, b=X, out=out, out_diagonal=diagonal),
    ]
