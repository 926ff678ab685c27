"""Newton-Schulz in its two forms, each written once over a backend's verbs.

With p(x) = a x + b x³ + c x⁵ a step is X ← a X + (b A + c A²) X, A = X Xᵀ, for X of m rows and n ≥ m columns.

The standard form does that literally. The Gram form (Dao-AILab, "Gram Newton-Schulz", 2026) notices that X only ever
gets multiplied from the left by polynomials in its first Gram matrix: it iterates on m x m matrices and multiplies X
once at the end. In bf16 the rounding error of the Gram matrix makes small eigenvalues negative, which the iteration
then amplifies, so it must start afresh from X now and then: see `segments`.

The iterates of one X are U f(Σ) Vᵀ with odd f that saturate at ever smaller singular values; a fixed sum of them is as
near to U Σ^p Vᵀ as its weights are good (spectral.py), and costs little beside the last iterate. In Gram form it is
a sum of m x m matrices, but for its first term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import memory
from .coefficients import Schedule, Triple


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
    """A, of which rounding took nothing that is known if it is a tensor."""
    return A if isinstance(A, Square) else Square(A)


class Products(Protocol):
    """The verbs that the iteration is written in; every backend has them.

    All stacks are (batch, rows, cols), bf16 or fp16. `scale`, (batch,) fp32, stands for a factor of X, which is only
    multiplied where X is used: twice in X Xᵀ.
    """

    def precise_squares(self) -> bool:
        """Whether the verbs use and write `Square.diagonal`."""

    def add(
        self,
        A: Square,
        *,
        out: Square,
        C: Square | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        """Write scale·(alpha·A + beta·C + gamma·I), of any shape if gamma is 0; `out` may be A or C."""

    def then(self, run: Callable[[], object], operands: Sequence[Tensor]) -> None:
        """Do `run`, torch operations that read and write `operands`, where it stands in the order of the products."""

    def syrk(
        self,
        A: Tensor | Square,
        *,
        out: Square,
        C: Square | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
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
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        """Write scale·(alpha·A·X + beta·C + gamma·I), of any shape if gamma is 0."""


class Segment(NamedTuple):
    """Steps start..stop of a Gram iteration between two visits to X."""

    start: int
    stop: int


_ROUNDOFF = 2.0**-9  # of bf16; fp16 is stepped in the same segments and keeps its advantage
# By how much rounding may change an eigenvalue of Q, in the worst case that is simulated. Real errors are random and
# smaller; segments within these bounds stay within the accuracy rule on every spectrum of tests/matrices.py, longer
# ones do not. The bound of three steps is for 256 rows: their errors average out as 1/√rows.
_ALLOWED = {2: 0.22, 3: 0.26}
_ROWS_OF_BOUND = 256


def _change_of_q(triples: Sequence[Triple], eigenvalues: Sequence[float], loss: float) -> float:
    """Worst relative change of Q's eigenvalues if R starts `loss` too small and loses more with every product."""
    exact = [(r, 1.0) for r in eigenvalues]
    rounded = [(r - loss, 1.0) for r in eigenvalues]
    for a, b, c in triples:
        largest_w = max(abs(r * (a + b * r + c * r * r)) for r, _ in exact)
        exact = [(r * s * s, q * s) for r, q in exact for s in (a + b * r + c * r * r,)]
        loss = _ROUNDOFF * (max(r for r, _ in exact) + abs(a) * largest_w)
        rounded = [(r * s * s - loss, q * s) for r, q in rounded for s in (a + b * r + c * r * r,)]
    changes = [abs(near / q - 1) for (_, q), (_, near) in zip(exact, rounded, strict=True) if q]
    # Coefficients that vanish or explode: nothing to judge by, so no segment longer than one step
    return max(changes) if changes and all(map(math.isfinite, changes)) else math.inf


def _largest_image(triples: Sequence[Triple], eigenvalues: Sequence[float], loss: float) -> float:
    """Of the square roots of `eigenvalues`, if R starts `loss` too small or too large."""
    largest = 0.0
    for eigenvalue in eigenvalues:
        for r in (eigenvalue - loss, eigenvalue + loss):
            image = math.sqrt(eigenvalue)
            for a, b, c in triples:
                s = a + b * r + c * r * r
                r, image = r * s * s, image * s
            largest = max(largest, abs(image))
    return largest


def segments(schedule: Schedule, size: int, precise: bool) -> tuple[Segment, ...]:
    """Where the Gram form goes back to X, from a simulation.

    Args:
        schedule: what to iterate.
        size: m.
        precise: whether the backend has precise squares.
    """
    return _simulated(schedule.triples, schedule.margin, size, precise)


def _tolerated(triples: Sequence[Triple]) -> float:
    """How far above 1 a singular value may be that these steps do not let explode."""
    x = 1.0
    while x < 1.5:
        image = x
        for a, b, c in triples:
            image = abs(image * (a + b * image**2 + c * image**4))
            if image > 1.5:
                return x
        x += 0.001
    return x


@lru_cache(maxsize=256)
def _simulated(triples: tuple[Triple, ...], margin: float, size: int, precise: bool) -> tuple[Segment, ...]:
    """From the scalar map on the eigenvalues of R.

    As few segments as the bounds allow, and of those the choice with the smallest change. A segment of one step is the
    standard form's step and always allowed.

    Args:
        triples: (a, b, c) of every step.
        margin: of the coefficient set.
        size: m, of which the power of two below counts.
        precise: whether the backend has precise squares.
    """
    at_step = [[0.0] + [10 ** (-8 + i / 50) / margin**2 for i in range(401)]]
    for a, b, c in triples:
        at_step.append([r * s * s for r in at_step[-1] for s in (a + b * r + c * r * r,)])

    tolerated = [_tolerated(triples[stop:]) for stop in range(len(triples) + 1)]

    def change(start: int, stop: int) -> float:
        """Of this segment, relative to its bound."""
        length = stop - start
        if length == 1:
            return 0.0
        # The first R has trace 1 and so few large eigenvalues to take rounding errors from; later ones have many.
        weight = 1 / 3 if start == 0 else 1.0
        loss = weight * _ROUNDOFF * max(at_step[start])
        averaged = 1.0 if length == 2 else math.sqrt(_ROWS_OF_BOUND / (1 << max(size, 1).bit_length() - 1))
        # Where the next steps explode a little above 1, a Q that came out too large must not take X there.
        if tolerated[stop] < 1.1 and _largest_image(triples[start:stop], at_step[start], loss) > tolerated[stop]:
            return math.inf
        return _change_of_q(triples[start:stop], at_step[start], loss) * averaged / _ALLOWED[length]

    best: list[tuple[int, float, tuple[Segment, ...]]] = [(0, 0.0, ())]
    for stop in range(1, len(triples) + 1):
        options = []
        for length in range(1, min(stop, 3 if precise else 2) + 1):
            count, worst, before = best[stop - length]
            if (here := change(stop - length, stop)) <= 1.0:
                segment = Segment(stop - length, stop)
                options.append((count + 1, max(worst, here), (*before, segment)))
        best.append(min(options))
    return best[-1][2]


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
    """What a weighted sum of iterates needs beside them.

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
    """Σ wᵢ Xᵢ, an iterate at a time; only Gram matrices and the sum are scaled."""
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
        form = _gram_sum if ops.precise_squares() else _standard_sum  # which it is with a segment for every step
        return form(ops, X, Y, squares, scale, schedule, blend)
    R, W, S, Q, Q_next = squares
    for start, stop in segments(schedule, X.shape[1], ops.precise_squares()):
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
    """Σ wᵢ Xᵢ = w₀ X₀ + (w₂ I + w₃ S₂ + T Q) X₂, where Q = S₂ S₃ and T = w₄ I + S₄ (w₅ I + S₅ (…)).

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
    """How many squares a form of the iteration needs for a schedule."""
    return ALGORITHMS[algorithm].squares_of_sum if schedule.weights else ALGORITHMS[algorithm].squares
