"""Segments of the Gram form, which goes back to X between them: a simulation of what rounding does to eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .coefficients import Schedule, Triple


class Segment(NamedTuple):
    """Steps start..stop of a Gram iteration between two visits to X."""

    start: int
    stop: int


_ROUNDOFF = 2.0**-9  # of bf16; fp16 is stepped in the same segments and keeps its advantage


# By how much rounding may change an eigenvalue of Q, in the worst case that is simulated. Real errors are random and
# smaller; segments within these bounds stay within the accuracy rule on every spectrum of checks/matrices.py, longer
# ones do not. The bound of three steps is for 256 rows: their errors average out as 1/√rows.
_ALLOWED = {2: 0.22, 3: 0.26}


_ROWS_OF_BOUND = 256


def _change_of_q(triples: Sequence[Triple], eigenvalues: Sequence[float], loss: float) -> float:
    """Return the worst relative change of Q's eigenvalues if R starts `loss` too small and every product adds to it."""
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
    """Return the largest image of the square roots of `eigenvalues` if R starts `loss` too small or too large."""
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
    """Return the segments of a Gram iteration. Between two of them it goes back to X.

    Args:
        schedule: what to iterate.
        size: m.
        precise: whether the backend has precise squares.
    """
    return _simulated(schedule.triples, schedule.margin, size, precise)


def _tolerated(triples: Sequence[Triple]) -> float:
    """Return the largest singular value, from 1 on, that these steps do not let explode."""
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
    """Find `segments` by the scalar map on the eigenvalues of R.

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
        """Return the change that this segment makes, relative to its bound."""
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
