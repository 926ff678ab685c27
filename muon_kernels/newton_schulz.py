"""Newton-Schulz in its two forms, each written once over a backend's verbs.

With p(x) = a x + b x³ + c x⁵ a step is X ← a X + (b A + c A²) X, A = X Xᵀ, for X of m rows and n ≥ m columns.

The standard form does that literally. The Gram form (Dao-AILab, "Gram Newton-Schulz", 2026) notices that X only ever gets
multiplied from the left by polynomials in its first Gram matrix: it iterates on m x m matrices and multiplies X once at the
end. In bf16 the rounding error of the Gram matrix makes small eigenvalues negative, which the iteration then amplifies, so
it must start afresh from X now and then: see `segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from torch import Tensor

Triple = tuple[float, float, float]


class Products(Protocol):
    """The verbs that the iteration is written in; every backend has them. All stacks are (batch, rows, cols) bf16."""

    def split_products(self) -> bool:
        """Whether `out_low` and `A_low` are there: 16 significant bits instead of 8 where they matter."""

    def syrk(
        self,
        A: Tensor,
        *,
        out: Tensor,
        C: Tensor | None = None,
        C_low: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        scale: Tensor | None = None,
        out_low: Tensor | None = None,
    ) -> None:
        """Write scale·(alpha·A·Aᵀ + beta·(C + C_low) + gamma·I), exactly symmetric, and to out_low what rounding lost."""

    def syrkx(self, A: Tensor, B: Tensor, *, out: Tensor, A_low: Tensor | None = None) -> None:
        """Write (A + A_low)·B, which the caller knows to be symmetric; exactly symmetric."""

    def gemm(
        self,
        A: Tensor,
        X: Tensor,
        *,
        out: Tensor,
        C: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        """Write scale·(alpha·A·X + beta·C)."""


class Segment(NamedTuple):
    """Steps start..stop of a Gram iteration between two visits to X; `split` carries its first R in 16 bits."""

    start: int
    stop: int
    split: bool


# bf16's unit roundoff, and the change of an eigenvalue of Q that rounding may cause in the worst case. Rounding errors are
# random and seldom near the worst case: segments under this bound stay at the standard form's accuracy on every spectrum of
# tests/matrices.py, those well above it do not (tests/test_newton_schulz.py).
_ROUNDOFF = 2.0**-9
_WORST_CHANGE = 0.25
_LONGEST_SEGMENT = 3


def _change_of_q(triples: Sequence[Triple], eigenvalues: Sequence[float], split: bool) -> float:
    """Worst relative change of Q's eigenvalues if every R loses roundoff·‖R‖ at every eigenvalue."""
    top = max(eigenvalues)
    loss = (8 * _ROUNDOFF * _ROUNDOFF if split else _ROUNDOFF) * top
    exact = [(r, 1.0) for r in eigenvalues]
    rounded = [(r - loss, 1.0) for r in eigenvalues]
    for a, b, c in triples:
        exact = [(r * s * s, q * s) for r, q in exact for s in (a + b * r + c * r * r,)]
        loss = _ROUNDOFF * max(r for r, _ in exact)
        rounded = [(r * s * s - loss, q * s) for r, q in rounded for s in (a + b * r + c * r * r,)]
    return max(abs(near / q - 1) for (_, q), (_, near) in zip(exact, rounded, strict=True) if q)


@lru_cache(maxsize=256)
def segments(triples: tuple[Triple, ...], margin: float, split_products: bool) -> tuple[Segment, ...]:
    """Where the Gram form goes back to X, from a simulation of the scalar map on eigenvalues of R.

    As few segments as keep every eigenvalue of Q within the bound above; among those, the fewest split and then the most
    accurate. A segment of one step is the standard form's step and always allowed.
    """
    spectrum = [0.0] + [10 ** (-8 + i / 50) / margin**2 for i in range(401)]
    at_step = [spectrum]
    for a, b, c in triples:
        at_step.append([r * (a + b * r + c * r * r) ** 2 for r in at_step[-1]])

    def candidates(start: int, stop: int) -> list[tuple[float, bool]]:
        if stop - start == 1:
            return [(0.0, False)]
        halves = (False, True) if split_products and stop - start > 2 else (False,)
        changes = [(_change_of_q(triples[start:stop], at_step[start], split), split) for split in halves]
        return [(change, split) for change, split in changes if change <= _WORST_CHANGE]

    best: list[tuple[tuple[int, int, float], tuple[Segment, ...]]] = [((0, 0, 0.0), ())]
    for stop in range(1, len(triples) + 1):
        options = []
        for start in range(max(0, stop - _LONGEST_SEGMENT), stop):
            (count, splits, worst), before = best[start]
            for change, split in candidates(start, stop):
                cost = (count + 1, splits + split, max(worst, change))
                options.append((cost, (*before, Segment(start, stop, split))))
        best.append(min(options))
    return best[-1][1]


def _standard_step(
    ops: Products, X: Tensor, out: Tensor, A: Tensor, B: Tensor, scale: Tensor | None, triple: Triple
) -> None:
    a, b, c = triple
    ops.syrk(X, out=A, scale=None if scale is None else scale * scale)
    if c == 0:
        ops.gemm(A, X, C=X, out=out, alpha=b, beta=a, scale=scale)
    else:
        ops.syrk(A, C=A, alpha=c, beta=b, out=B)
        ops.gemm(B, X, C=X, out=out, beta=a, scale=scale)


def standard(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Tensor],
    scale: Tensor,
    triples: tuple[Triple, ...],
    margin: float,
) -> Tensor:
    """Apply the polynomials of `triples` to the singular values of scale·X / margin.

    Args:
        ops: the backend.
        X: (batch, m, n) bf16, m ≤ n, overwritten.
        Y: like X, overwritten.
        squares: (batch, m, m) bf16, `squares_needed` of them, overwritten.
        scale: (batch,) fp32, the reciprocal Frobenius norms of X.
        triples: (a, b, c) of every step.
        margin: of the coefficient set.

    Returns:
        X or Y, whichever holds the result.
    """
    pending: Tensor | None = scale / margin
    for triple in triples:
        _standard_step(ops, X, Y, squares[0], squares[1], pending, triple)
        X, Y, pending = Y, X, None
    return X


def gram(
    ops: Products,
    X: Tensor,
    Y: Tensor,
    squares: Sequence[Tensor],
    scale: Tensor,
    triples: tuple[Triple, ...],
    margin: float,
) -> Tensor:
    """Do what `standard` does, by the Gram form; the same arguments.

    In every segment, with R = X Xᵀ: S = a I + b R + c R², Q ← Q S, R ← R S²; at its end X ← Q X. The identity goes into S
    before S is rounded, and no product is expanded: both would cancel. Where a segment has three steps its first R is split:
    the iteration amplifies the error of that R by a² twice, that of later ones once.
    """
    R, R_low, W, S, Q, Q_next = squares
    pending: Tensor | None = scale / margin
    for start, stop, split in segments(triples, margin, ops.split_products()):
        if stop - start == 1:
            _standard_step(ops, X, Y, R, S, pending, triples[start])
            X, Y, pending = Y, X, None
            continue
        low = R_low if split else None
        ops.syrk(X, out=R, out_low=low, scale=None if pending is None else pending * pending)
        for step in range(start, stop):
            a, b, c = triples[step]
            factor = Q if step == start else S
            ops.syrk(R, C=R, C_low=low, alpha=c, beta=b, gamma=a, out=factor)
            if step + 1 < stop:
                ops.syrkx(R, factor, A_low=low, out=W)
                ops.syrkx(W, factor, out=R)
                low = None
            if step > start:
                ops.syrkx(Q, S, out=Q_next)
                Q, Q_next = Q_next, Q
        ops.gemm(Q, X, out=Y, scale=pending)
        X, Y, pending = Y, X, None
    return X


class Algorithm(NamedTuple):
    """A form of the iteration and the (batch, m, m) buffers it asks for."""

    run: Callable[..., Tensor]
    squares_needed: int


ALGORITHMS = {"standard": Algorithm(standard, 2), "gram": Algorithm(gram, 6)}
