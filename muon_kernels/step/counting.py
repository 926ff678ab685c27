"""Counts of the iteration's launches, FLOPs and bytes, made by running it over a backend that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..newton_schulz import ALGORITHMS, Blend, Square, square, squares_of


class Counter:
    """A backend that does nothing but count what another one would do."""

    def __init__(self, symmetric: bool, precise: bool) -> None:
        self.launches = 0
        self.flops = 0
        self.bytes = 0
        self._symmetric, self.precise_squares = symmetric, precise

    def traffic(self, A: Square, B: Square, C: Tensor | None, out: Tensor, triangle: bool) -> int:
        """Return the bytes of a product of A, (batch, m, k), and B plus C: operands read and result written once."""
        operands = {id(t): t for t in (A.high, B.high, C, out) if t is not None}
        return sum(t.numel() * t.itemsize for t in operands.values())

    def _count(self, A: Square, B: Square, C: Tensor | None, out: Tensor, symmetric: bool) -> None:
        triangle = symmetric and self._symmetric
        batch, m, n = out.shape
        self.launches += 1
        self.bytes += self.traffic(A, B, C, out, triangle)
        self.flops += batch * A.high.shape[2] * (m * (m + 1) if triangle else 2 * m * n)

    def then(self, run: Callable[[], object], operands: Sequence[Tensor]) -> None:
        """Count one, however many operations it is, which does not run."""
        self.launches += 1
        self.bytes += sum(t.numel() * t.itemsize for t in operands)

    def add(self, A: Square, *, out: Square, C: Square | None = None, **_: object) -> None:
        """Count one; its FLOPs are too few to count."""
        self.then(lambda: None, [out.high, A.high] if C is None else [out.high, A.high, C.high])

    def syrk(self, A: Tensor | Square, *, out: Square, C: Square | None = None, **_: object) -> None:
        """Count one."""
        A = square(A)
        self._count(A, A, C.high if C else None, out.high, symmetric=True)

    def syrkx(self, A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
        """Count one."""
        self._count(A, B, None, out.high, symmetric=True)

    def gemm(
        self,
        A: Square,
        X: Tensor | Square,
        *,
        out: Tensor | Square,
        C: Tensor | Square | None = None,
        **_: object,
    ) -> None:
        """Count one."""
        self._count(A, square(X), square(C).high if C is not None else None, square(out).high, symmetric=False)


def count_iteration(
    counter: Counter,
    algorithm: str,
    m: int,
    n: int,
    schedule: Schedule,
) -> None:
    """Run the iteration on one m x n matrix that has no memory."""
    run = ALGORITHMS[algorithm].run

    def empty(cols: int) -> Tensor:
        return torch.empty(1, m, cols, dtype=torch.bfloat16, device="meta")

    def empty_square() -> Square:
        return Square(
            empty(m), torch.empty(1, m, dtype=torch.float32, device="meta") if counter.precise_squares else None
        )

    number = torch.empty(1, dtype=torch.float32, device="meta")
    blend = Blend(empty(n), *[number] * 5) if schedule.weights else None
    squares = [empty_square() for _ in range(squares_of(algorithm, schedule))]
    run(counter, empty(n), empty(n), squares, number, schedule, blend)


@lru_cache(maxsize=4096)
def count(
    algorithm: str,
    m: int,
    n: int,
    schedule: Schedule,
    symmetric: bool,
    precise: bool,
) -> tuple[int, int, int]:
    """Return (launches, FLOPs, bytes) of the iteration on one m x n matrix."""
    counter = Counter(symmetric, precise)
    count_iteration(counter, algorithm, m, n, schedule)
    return counter.launches, counter.flops, counter.bytes
