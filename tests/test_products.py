"""syrk, syrkx and gemm of every backend: exact on small integers, bounded against float64 elsewhere."""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from muon_kernels import backends
from muon_kernels.backends import cpu
from muon_kernels.newton_schulz import Square

SIZES = [1, 3, 16, 17, 63, 65, 129]
SHAPES = [(1, 1), (1, 9), (3, 17), (14, 32), (16, 1030), (23, 131), (63, 65), (65, 129), (129, 200), (200, 2100)]
BATCHES = [0, 1, 9]  # of 9 matrices two threads take whole ones, of fewer they share the columns


def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
    """Small integers: every partial sum is exact in fp32, so a result can only differ by its one rounding to bf16."""
    return torch.randint(low, high, shape).bfloat16()


def symmetric(batch: int, m: int) -> Tensor:
    upper = integers(batch, m, m).triu()
    return upper + upper.triu(1).mT


def polynomial_pair(batch: int, m: int) -> tuple[Tensor, Tensor]:
    """Two symmetric matrices whose product is symmetric: x I + y J with different x, y commute."""
    J = torch.ones(m, m)
    signs = torch.randint(0, 2, (batch, m, 1)).float() * 2 - 1  # D J D keeps the family closed
    first, second = (a * torch.eye(m) + b * signs * J * signs.mT for a, b in ((2.0, 1.0), (-3.0, 2.0)))
    return first.bfloat16(), second.bfloat16()


def guarded(batch: int, rows: int, cols: int, pad: int = 3) -> tuple[Tensor, Tensor]:
    """A strided view full of NaN inside a block of sentinels, and the block."""
    block = torch.full((batch, rows + 2, cols + 2 * pad), 77.0, dtype=torch.bfloat16)
    view = block[:, 1 : rows + 1, pad : pad + cols]
    view.fill_(torch.nan)
    return view, block


def inside_nan(t: Tensor) -> Tensor:
    """A strided copy with NaN all around: a factor of zero would not hide that a neighbour was read."""
    batch, rows, cols = t.shape
    return torch.full((batch, rows + 2, cols + 5), torch.nan).bfloat16()[:, 1:-1, 2 : cols + 2].copy_(t)


def at_the_end_of_memory(t: Tensor) -> Tensor:
    """A copy behind whose last element begins a page that nobody may touch."""
    size = -(-2 * t.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - 2 * t.numel()).view(t.shape).copy_(t)
    end = ctypes.c_void_p(copy.data_ptr() + 2 * t.numel())
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy


def assert_untouched(block: Tensor, rows: int, cols: int, pad: int = 3) -> None:
    inside = torch.zeros_like(block, dtype=torch.bool)
    inside[:, 1 : rows + 1, pad : pad + cols] = True
    assert (block[~inside] == 77).all(), "written outside the output"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_syrk_is_exact_on_integers(backend: str, shape: tuple[int, int], batch: int) -> None:
    m, n = shape
    X = integers(batch, m, n)
    out, block = guarded(batch, m, m)
    backends.get(backend).syrk(X, out=Square(out))
    assert torch.equal(out, (X.double() @ X.double().mT).bfloat16())
    assert torch.equal(out, out.mT)
    assert_untouched(block, m, m)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("shape", [(17, 40), (65, 40), (200, 300)], ids=str)
def test_transposed_operands_may_be_two(isa: str, shape: tuple[int, int]) -> None:
    """What Product allows, though no form of the iteration asks for it."""
    m, k = shape
    A, B, out = integers(2, m, k), integers(2, m, k), torch.full((2, m, m), torch.nan).bfloat16()
    with cpu.forced(isa):
        cpu._product(Square(A), Square(B), Square(out), transposed=True)
        assert torch.equal(out, (A.double() @ B.double().mT).bfloat16())
        cpu._product(Square(A), Square(B), Square(out), transposed=True, symmetric=True)
    assert torch.equal(out.tril(), (A.double() @ B.double().mT).bfloat16().tril()) and torch.equal(out, out.mT)


@pytest.mark.parametrize("m", SIZES)
def test_syrk_with_addends_is_exact_on_integers(backend: str, m: int) -> None:
    A, C = symmetric(3, m), symmetric(3, m)
    scale = torch.tensor([1.0, 0.5, 2.0])
    out, block = guarded(3, m, m)
    backends.get(backend).syrk(Square(A), C=Square(C), alpha=2.0, beta=-4.0, gamma=8.0, scale=scale, out=Square(out))
    a, c = A.double(), C.double()
    exact = (2 * a @ a.mT - 4 * c + 8 * torch.eye(m)) * scale.square()[:, None, None]
    tolerance = 0 if backends.get(backend).precise_squares else 2**-8  # torch rounds before the addends
    torch.testing.assert_close(out.double(), exact.bfloat16().double(), rtol=tolerance, atol=tolerance * m * 16)
    assert torch.equal(out, out.mT)
    assert_untouched(block, m, m)


@pytest.mark.parametrize("m", SIZES)
def test_syrkx_is_exact_on_integers(backend: str, m: int) -> None:
    A, B = polynomial_pair(3, m)
    out, block = guarded(3, m, m)
    backends.get(backend).syrkx(Square(A), Square(B), out=Square(out))
    assert torch.equal(out, (A.double() @ B.double()).bfloat16())
    assert torch.equal(out, out.mT)
    assert_untouched(block, m, m)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_is_exact_on_integers(backend: str, shape: tuple[int, int], batch: int) -> None:
    m, n = shape
    A, X = integers(batch, m, m), integers(batch, m, n)
    out, block = guarded(batch, m, n)
    backends.get(backend).gemm(Square(A), X, C=X, alpha=2.0, beta=-4.0, out=out)
    assert torch.equal(out, (2 * A.double() @ X.double() - 4 * X.double()).bfloat16())
    assert_untouched(block, m, n)
    backends.get(backend).gemm(Square(A), X, out=out, scale=torch.full((batch,), 0.5))
    assert torch.equal(out, (0.5 * A.double() @ X.double()).bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operands_may_be_strided(backend: str, shape: tuple[int, int]) -> None:
    m, n = shape
    A, X, C = (inside_nan(integers(2, m, k)) for k in (m, n, n))
    out, block = guarded(2, m, n, pad=1)
    backends.get(backend).gemm(Square(A), X, C=C, beta=-4.0, out=out)
    assert torch.equal(out, (A.double() @ X.double() - 4 * C.double()).bfloat16())
    assert_untouched(block, m, n, pad=1)
    out, block = guarded(2, m, m, pad=1)
    backends.get(backend).syrk(X, out=Square(out))
    assert torch.equal(out, (X.double() @ X.double().mT).bfloat16())
    assert_untouched(block, m, m, pad=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_touched_behind_the_last_element(backend: str, shape: tuple[int, int]) -> None:
    m, n = shape
    A, X, C, out = (at_the_end_of_memory(integers(1, m, k)) for k in (m, n, n, n))
    backends.get(backend).gemm(Square(A), X, C=C, beta=-4.0, out=out)
    assert torch.equal(out, (A.double() @ X.double() - 4 * C.double()).bfloat16())
    R = at_the_end_of_memory(integers(1, m, m))
    backends.get(backend).syrk(X, out=Square(R))
    assert torch.equal(R, (X.double() @ X.double().mT).bfloat16())


def test_operands_that_do_not_fit_are_refused(backend: str) -> None:
    ops = backends.get(backend)
    A, X = integers(2, 8, 8), integers(2, 8, 9)
    with pytest.raises((ValueError, RuntimeError)):
        ops.gemm(Square(A), integers(2, 7, 9), out=torch.empty_like(X))
    with pytest.raises((ValueError, RuntimeError)):
        ops.gemm(Square(A), X[:1], out=torch.empty_like(X))
    with pytest.raises((ValueError, RuntimeError)):
        ops.gemm(Square(A), X, C=A, beta=1.0, out=torch.empty_like(X))


@pytest.mark.parametrize("m", [*SIZES, 200])
def test_parts_of_squares_are_exact_on_integers(backend: str, m: int) -> None:
    """high and diagonal of any size, so that none can be lost or counted twice unseen."""
    ops = backends.get(backend)
    if not ops.precise_squares:
        pytest.skip("the backend says that it has none")

    def square() -> tuple[Square, Tensor]:
        """A square, and its value in float64."""
        diagonal = integers(3, m).float()
        A = Square(inside_nan(symmetric(3, m)), diagonal)
        return A, A.high.double() + diagonal.double().diag_embed()

    def check(exact: Tensor, symmetric: bool = True) -> None:
        """The result is `exact`, or the lower triangle of it, mirrored."""
        if symmetric:
            exact = exact.tril() + exact.tril(-1).mT
        assert torch.equal(high, exact.float().bfloat16())
        on_diagonal = high.double().diagonal(dim1=-2, dim2=-1) + diagonal.double()
        assert torch.equal(on_diagonal, exact.diagonal(dim1=-2, dim2=-1))
        assert_untouched(block, m, m)

    (A, a), (B, b), (C, c) = square(), square(), square()
    high, block = guarded(3, m, m)
    diagonal = torch.full((3, m), torch.nan)
    out = Square(high, diagonal)
    ops.syrkx(A, B, out=out)
    check(a @ b)
    ops.syrkx(A, B, gamma=8.0, out=out)
    check(a @ b + 8 * torch.eye(m))
    scale = torch.tensor([1.0, 0.5, 2.0])
    eye, scales = torch.eye(m), scale[:, None, None]
    ops.syrk(A, C=C, alpha=2.0, beta=-4.0, gamma=8.0, scale=scale, out=out)
    check(scales**2 * (2 * a @ a.mT - 4 * c + 8 * eye))
    ops.syrk(A, C=A, alpha=2.0, beta=-4.0, gamma=8.0, scale=scale, out=out)
    check(scales**2 * (2 * a @ a.mT - 4 * a + 8 * eye))
    ops.gemm(A, B, C=C, alpha=2.0, beta=-4.0, gamma=8.0, out=out)
    check(2 * a @ b - 4 * c + 8 * eye, symmetric=False)
    ops.gemm(A, B, C=B, alpha=2.0, beta=-4.0, gamma=8.0, out=out)
    check(2 * a @ b - 4 * b + 8 * eye, symmetric=False)
    for n in (m, 2 * m + 1):
        X, Y = integers(3, m, n), integers(3, m, n)
        for of in (X, Y):  # added to the product, or another matrix
            to, around = guarded(3, m, n)
            ops.gemm(A, X, C=of, alpha=2.0, beta=-4.0, scale=scale, out=to)
            assert torch.equal(to, (scales * (2 * a @ X.double() - 4 * of.double())).float().bfloat16())
            assert_untouched(around, m, n)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("place", ["another", "A", "C"])
def test_sums_are_exact_on_integers(backend: str, m: int, place: str) -> None:
    """Of squares and of other matrices, with all that may be added or left out, in the place of an operand too."""
    ops = backends.get(backend)
    scale = torch.tensor([1.0, 0.5, 2.0])

    def square() -> tuple[Square, Tensor]:
        high = inside_nan(integers(3, m, m))
        diagonal = integers(3, m).float() if ops.precise_squares else None
        return Square(high, diagonal), high.double() + (diagonal.double().diag_embed() if diagonal is not None else 0)

    for alpha, beta, gamma, by in ((2.0, -4.0, 8.0, scale), (1.0, 0.0, 8.0, None), (-2.0, 1.0, 0.0, None)):
        for wide in (False, True):
            (A, a), (C, c) = square(), square()
            if wide:
                A, C = (Square(inside_nan(integers(3, m, 2 * m + 1))) for _ in range(2))
                a, c, gamma = A.high.double(), C.high.double(), 0.0
            for addend in (C, None) if place != "C" else (C,):
                block, around = guarded(3, m, a.shape[2])
                of_out = torch.full((3, m), torch.nan) if A.diagonal is not None else None
                out = {"another": Square(block, of_out), "A": A, "C": C}[place]
                exact = alpha * a + (beta * c if addend else 0) + (gamma * torch.eye(m) if gamma else 0)
                exact = exact if by is None else by[:, None, None] * exact
                ops.add(A, C=addend, alpha=alpha, beta=beta, gamma=gamma, scale=by, out=out)
                assert torch.equal(out.high, exact.float().bfloat16())
                if out.diagonal is not None:
                    on_diagonal = out.high.double().diagonal(dim1=-2, dim2=-1) + out.diagonal.double()
                    assert torch.equal(on_diagonal, exact.diagonal(dim1=-2, dim2=-1))
                if place == "A":
                    a = exact
                if place == "another":
                    assert_untouched(around, m, a.shape[2])


@pytest.mark.parametrize("shape", [(65, 129), (129, 1300)], ids=str)
def test_error_is_that_of_one_rounding(backend: str, shape: tuple[int, int]) -> None:
    """|out - exact| ≤ 2^-8 |exact| (half an ulp and slack for fp32 sums) + n 2^-24 Σ|a||x|."""
    m, n = shape
    A, X = torch.randn(2, m, n).bfloat16(), torch.randn(2, n, m).bfloat16()
    out = torch.empty(2, m, m, dtype=torch.bfloat16)
    backends.get(backend).gemm(Square(A), X, out=out)
    exact, size = A.double() @ X.double(), A.double().abs() @ X.double().abs()
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + n * 2**-24 * size).all()


@pytest.mark.parametrize("m", [17, 65, 200])
def test_precise_squares(backend: str, m: int) -> None:
    """The diagonal makes up for its rounding, and counts in products."""
    ops = backends.get(backend)
    if not ops.precise_squares:
        pytest.skip("the backend says that it has none")

    def empty() -> tuple[Square, Tensor]:
        diagonal = torch.full((2, m), torch.nan)
        return Square(torch.full((2, m, m), torch.nan, dtype=torch.bfloat16), diagonal), diagonal

    def value(S: Square, diagonal: Tensor) -> Tensor:
        return S.high.double() + diagonal.double().diag_embed()

    def on_diagonal(A: Tensor) -> Tensor:
        return A.diagonal(dim1=-2, dim2=-1)

    X = torch.randn(2, m, 2 * m).bfloat16()
    R, of_r = empty()
    ops.syrk(X, out=R, alpha=1 / m, gamma=100.0)
    exact = X.double() @ X.double().mT / m + 100 * torch.eye(m)
    torch.testing.assert_close(on_diagonal(value(R, of_r)), on_diagonal(exact), rtol=2**-15, atol=0)
    assert ((value(R, of_r) - exact).abs() <= exact.abs() * 2**-8 + 2**-16).all()

    # A square times itself and times a matrix, each against the value that the parts add up to.
    r = value(R, of_r)
    W, of_w = empty()
    ops.syrkx(R, R, out=W)
    torch.testing.assert_close(on_diagonal(value(W, of_w)), on_diagonal(r @ r), rtol=2e-5, atol=0)
    S, of_s = empty()
    ops.syrk(R, C=R, alpha=0.5, beta=-2.0, gamma=3.0, out=S)
    exact = 0.5 * r @ r - 2 * r + 3 * torch.eye(m)
    torch.testing.assert_close(on_diagonal(value(S, of_s)), on_diagonal(exact), rtol=2e-5, atol=0)
    out = torch.empty_like(X)
    ops.gemm(R, X, out=out)
    exact = r @ X.double()
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-9).all()


def test_batched_equals_single_and_threads_do_not_matter(backend: str) -> None:
    """Bit for bit, for native kernels; torch promises that of its own products only for one shape."""
    ops = backends.get(backend)
    if not ops.precise_squares:
        pytest.skip("torch's products")
    X = torch.randn(7, 65, 300).bfloat16()
    out, again, single = (torch.empty(7, 65, 65, dtype=torch.bfloat16) for _ in range(3))
    ops.syrk(X, out=Square(out))
    torch.set_num_threads(1)
    ops.syrk(X, out=Square(again))
    for i in range(7):
        ops.syrk(X[i : i + 1], out=Square(single[i : i + 1]))
    assert torch.equal(out, again)
    assert torch.equal(out, single)


def test_nan_stays_in_its_matrix(backend: str) -> None:
    X = torch.randn(3, 33, 65).bfloat16()
    X[1, 4, 64] = torch.nan
    out = torch.empty(3, 33, 33, dtype=torch.bfloat16)
    backends.get(backend).syrk(X, out=Square(out))
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()
