"""Newton-Schulz in its two forms, each written once over a backend's verbs.

With p(x) = a x + b x³ + c x⁵ a step is X ← a X + (b A + c A²) X, A = X Xᵀ, for X of m rows and n ≥ m columns.

The standard form does that literally. The Gram form (Dao-AILab, "Gram Newton-Schulz", 2026) notices that X only ever
gets multiplied from the left by polynomials in its first Gram matrix: it iterates on m x m matrices and multiplies X
once at the end. In bf16 the rounding error of the Gram matrix makes small eigenvalues negative, which the iteration
then amplifies, so it must start afresh from X now and then: see `segments`.

The iterates of one X are U f(Σ) Vᵀ with odd f that saturate at ever smaller singular values; a fixed sum of them is as
near to U Σ^p Vᵀ as its weights are good (powers.py), and costs little beside the last iterate. In Gram form it is
a sum of m x m matrices, but for its first term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from . import memory
from .coefficients import Schedule, Triple
from .segments import segments

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Square(NamedTuple):
    """A stack of symmetric matrices: high + diag(diagonal).

    Attributes:
        high: (batch, m, m) bf16 or fp16, what is multiplied.
        diagonal: (batch, m) fp32, what rounding took from the diagonal; None on a backend that cannot use it. Gram
            matrices and their polynomials are near a multiple of the identity for flat spectra, and an error there is
            systematic.
    """

    high: Tensor
    diagonal: Tensor | None = None


def square(A: Tensor | Square) -> Square:
    """Wrap a plain tensor as a `Square` without a diagonal correction."""
    return A if isinstance(A, Square) else Square(A)


class Factors(TypedDict, total=False):
    """Factors of a product's terms.

    Attributes:
        alpha: of the product; 1 unless given.
        beta: of C; 0 unless given.
        gamma: of the identity, in the diagonal; 0 unless given.
        scale: (batch,) fp32, of all of it; see `Products`.
    """

    alpha: float
    beta: float
    gamma: float
    scale: Tensor | None


class Products(Protocol):
    """The verbs that the iteration is written in; every backend has them.

    All stacks are (batch, rows, cols), bf16 or fp16. `scale`, (batch,) fp32, stands for a factor of X, which is only
    multiplied where X is used: twice in X Xᵀ.

    Attributes:
        precise_squares: whether the verbs use and write `Square.diagonal`.
    """

    precise_squares: bool

    def add(self, A: Square, *, out: Square, C: Square | None = None, **factors: Unpack[Factors]) -> None:
        """Write scale·(alpha·A + beta·C + gamma·I), of any shape if gamma is 0; `out` may be A or C."""

    def then(self, run: Callable[[], object], operands: Sequence[Tensor]) -> None:
        """Do `run`, torch operations that read and write `operands`, where it stands in the order of the products."""

    def syrk(self, A: Tensor | Square, *, out: Square, C: Square | None = None, **factors: Unpack[Factors]) -> None:
        """Write scale²·(alpha·A·Aᵀ + beta·C + gamma·I), exactly symmetric."""

    def syrkx(self, A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
        """Write A·B + gamma·I, which the caller knows to be symmetric, exactly symmetric."""

    def gemm(
        self,
        A: Square,
        X: Tensor | Square,
        *,
        out: Tensor | Square,
        C: Tensor | Square | None = None,
        **factors: Unpack[Factors],
    ) -> None:
        """Write scale·(alpha·A·X + beta·C + gamma·I), of any shape if gamma is 0."""


def _standard_step(
    ops: Products, X: Tensor, out: Tensor, A: Square, B: Square, scale: Tensor | None, triple: Triple
) -> None:
    a, b, c = triple
    ops.syrk(X, out=A, scale=scale)
    if c == 0:
        ops.gemm(A, X, C=X, out=out, alpha=b, beta=a, scale=scale)
    else:
        ops.syrk(A, C=A, alpha=c, beta=b, out=B)
        ops.gemm(B, X, C=X, out=out, beta=a, scale=scale)


class Blend(NamedTuple):
    """Memory and numbers that a weighted sum of iterates needs beside them.

    Attributes:
        total: (batch, m, n) like X, overwritten.
        norms: (batch,) fp64, read: the Frobenius norms of the matrices that X was made from.
        scale: (batch,) fp32, written: what brings the largest singular value of X to 1 or below, but not far below.
        factor: (batch,) fp32, written: what the sum is multiplied by.
        of_gram, of_square: (batch,) fp32, written: what the first Gram matrix and its square are multiplied by.
    """

    total: Tensor
    norms: Tensor
    scale: Tensor
    factor: Tensor
    of_gram: Tensor
    of_square: Tensor


def _measure(
    ops: Products, X: Tensor, squares: Sequence[Square], scale: Tensor | None, power: float, blend: Blend
) -> None:
    """Write R = scale² X Xᵀ and R², the squares, and the numbers of the blend.

    The Frobenius norm may be √m times the largest singular value, and what is as far below 1 as the weights reach would
    be lost. ‖R²‖_F^¼ is no smaller than that value either, but at most m^⅛ times as large. The first step has these
    squares to begin with, and is spared two products.
    """
    R, S = squares[:2]

    def write() -> None:
        numbers = S.high.shape[:1]
        kinds = torch.float32, torch.bool, torch.float64
        square, bound, is_zero, norms = memory.take(
            S.high.device, (S.high.shape, torch.float32), *[(numbers, dtype) for dtype in kinds]
        )
        if memory.rehearsing():
            return
        torch.linalg.vector_norm(square.copy_(S.high), dim=(1, 2), out=bound).pow_(0.25)
        bound.masked_fill_(torch.eq(bound, 0, out=is_zero), 1.0)
        torch.reciprocal(bound, out=blend.scale)
        torch.square(blend.scale, out=blend.of_gram)
        torch.square(blend.of_gram, out=blend.of_square)
        if scale is not None:
            blend.scale.mul_(scale)
        torch.pow(bound.copy_(norms.copy_(bound).mul_(blend.norms)), power, out=blend.factor).mul_(blend.scale)

    ops.syrk(X, out=R, scale=scale)
    ops.syrk(R, out=S)
    ops.then(write, [S.high])


def standard(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Square],
    scale: Tensor | None,
    schedule: Schedule,
    blend: Blend | None = None,
) -> Tensor:
    """Apply the polynomials of a schedule to the singular values of scale·X, or take a weighted sum of the iterates.

    Args:
        ops: the backend.
        X: (batch, m, n) bf16 or fp16, m ≤ n, overwritten.
        Y: like X, overwritten.
        squares: as many as `squares_of` says, overwritten.
        scale: (batch,) fp32, what brings the Frobenius norms of X to 1/margin; None if that is where they are.
        schedule: (a, b, c) of every step, at least two if iterates have weights.
        blend: if and only if iterates have weights.

    Returns:
        The stack that holds the result: X, Y or `blend.total`.
    """
    if blend is not None:
        return _standard_sum(ops, X, Y, squares, scale, schedule, blend)
    A, B = squares
    for triple in schedule.triples:
        _standard_step(ops, X, Y, A, B, scale, triple)
        X, Y, scale = Y, X, None
    return X


def _standard_sum(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Square],
    scale: Tensor | None,
    schedule: Schedule,
    blend: Blend,
) -> Tensor:
    """Compute Σ wᵢ Xᵢ, an iterate at a time; only Gram matrices and the sum are scaled."""
    triples, weights = schedule.triples, schedule.weights
    A, B = squares[:2]
    _measure(ops, X, squares, scale, schedule.power, blend)
    a, b, c = triples[0]
    ops.add(B, alpha=c, out=B, scale=blend.of_gram)
    ops.add(A, C=B, alpha=b, beta=1.0, out=B, scale=blend.of_gram)
    ops.gemm(B, X, C=X, beta=a, out=Y)
    total, kept = Square(X), weights[0]  # The sum so far is kept·total.
    X, Y = Y, blend.total
    for (a, b, c), weight in zip(triples[1:-1], weights[1:-2], strict=True):
        if weight:
            ops.add(Square(X), C=total, alpha=weight, beta=kept, out=total)
            kept = 1.0
        ops.syrk(X, out=A, scale=blend.scale)
        ops.syrk(A, C=A, alpha=c, beta=b, out=B)
        ops.gemm(B, X, C=X, beta=a, out=Y)
        X, Y = Y, X
    # w x + v (a x + b x³ + c x⁵): the last iterate itself is never needed.
    (a, b, c), (w, v) = triples[-1], weights[-2:]
    ops.add(Square(X), C=total, alpha=w + v * a, beta=kept, out=total)
    ops.syrk(X, out=A, scale=blend.scale)
    ops.syrk(A, C=A, alpha=c, beta=b, out=B)
    ops.gemm(B, X, C=total.high, alpha=v, beta=1.0, out=Y, scale=blend.factor)
    return Y


def gram(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Square],
    scale: Tensor | None,
    schedule: Schedule,
    blend: Blend | None = None,
) -> Tensor:
    """Do what `standard` does, by the Gram form; the same arguments.

    In every segment, with R = X Xᵀ: S = a I + b R + c R², Q ← Q S, R ← R S²; at its end X ← Q X. The identity goes
    into S before S is rounded, and no product is expanded: both would cancel.
    """
    if blend is not None:
        form = _gram_sum if ops.precise_squares else _standard_sum  # which it is with a segment for every step
        return form(ops, X, Y, squares, scale, schedule, blend)
    R, W, S, Q, Q_next = squares
    for start, stop in segments(schedule, X.shape[1], ops.precise_squares):
        if stop - start == 1:
            _standard_step(ops, X, Y, W, S, scale, schedule.triples[start])
            X, Y, scale = Y, X, None
            continue
        ops.syrk(X, out=R, scale=scale)
        for step in range(start, stop):
            a, b, c = schedule.triples[step]
            factor = Q if step == start else S
            ops.syrk(R, C=R, alpha=c, beta=b, gamma=a, out=factor)
            if step + 1 < stop:
                ops.syrkx(R, factor, out=W)
                ops.syrkx(W, factor, out=R)
            if step > start:
                ops.syrkx(Q, S, out=Q_next)
                Q, Q_next = Q_next, Q
        ops.gemm(Q, X, out=Y, scale=scale)
        X, Y, scale = Y, X, None
    return X


def _gram_sum(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Square],
    scale: Tensor | None,
    schedule: Schedule,
    blend: Blend,
) -> Tensor:
    """Compute Σ wᵢ Xᵢ = w₀ X₀ + (w₂ I + w₃ S₂ + T Q) X₂, where Q = S₂ S₃ and T = w₄ I + S₄ (w₅ I + S₅ (…)).

    Segments are of two steps, two, and the rest: with more at first, an eigenvalue that rounding left below zero
    explodes wherever one singular value is a few times as large as the others, as in momenta of trained layers; the
    last steps see a flatter spectrum. The sum is of squares as far as X₂, which costs less than a product with each
    iterate, but not as far as X₀, in which nothing would mask the rounding of squares as large as σ^(p-1) for the
    smallest σ. T and Q are of two Gram matrices, which rounding keeps from commuting: T Q is not symmetric.

    Raises:
        ValueError: X₁ has a weight.
    """
    triples, weights = schedule.triples, schedule.weights
    if weights[1]:
        raise ValueError(f"expected no weight of the second iterate, which is never there, got {weights[1]}")
    R, W, S, Q, *others = squares

    def factors(of: Sequence[Triple], out: Sequence[Square], squared: bool = False) -> None:
        """S = a I + b R + c R² of successive steps and R ← R S² between; R² is W if it is there."""
        for step, ((a, b, c), to) in enumerate(zip(of, out, strict=True)):
            if squared and step == 0:
                ops.add(R, C=W, alpha=b, beta=c, gamma=a, out=to)
            else:
                ops.syrk(R, C=R, alpha=c, beta=b, gamma=a, out=to)
            if step + 1 < len(of):
                ops.syrkx(R, to, out=W)
                ops.syrkx(W, to, out=R)

    _measure(ops, X, squares, scale, schedule.power, blend)
    ops.add(R, out=R, scale=blend.of_gram)
    ops.add(W, out=W, scale=blend.of_square)
    factors(triples[:2], (S, W), squared=True)
    ops.syrkx(S, W, out=Q)
    ops.gemm(Q, X, out=Y)
    X_2, X_4 = Y, blend.total
    ops.syrk(X_2, out=R, scale=blend.scale)
    factors(triples[2:4], (S, W))
    ops.syrkx(S, W, out=Q)
    ops.gemm(Q, X_2, out=X_4)
    ops.syrk(X_4, out=R, scale=blend.scale)
    (a, b, c), (*_, w, v) = triples[-1], weights
    factors((*triples[4:-1], (w + v * a, v * b, v * c)), (*others, W))  # the last two iterates in one
    T, spare = W, R
    for other, weight in zip(reversed(others), reversed(weights[4:-2]), strict=True):
        ops.syrkx(other, T, gamma=weight, out=spare)
        T, spare = spare, T
    ops.gemm(T, Q, C=S, beta=weights[3], gamma=weights[2], out=spare)
    ops.gemm(spare, X_2, C=X, beta=weights[0], out=X_4, scale=blend.factor)
    return X_4


class Algorithm(NamedTuple):
    """A form of the iteration, how many squares it needs, and how many for a weighted sum of iterates."""

    run: Callable[..., Tensor]
    squares: int
    squares_of_sum: int


ALGORITHMS = {
    "standard": Algorithm(standard, 2, 2),
    "gram": Algorithm(gram, 5, 6),
}


def squares_of(algorithm: str, schedule: Schedule) -> int:
    """Return the number of squares that a form of the iteration needs for a schedule."""
    return ALGORITHMS[algorithm].squares_of_sum if schedule.weights else ALGORITHMS[algorithm].squares
