"""Number of bf16 terms, which tensor cores multiply, that each number in a fused step's iteration is the sum of."""

from __future__ import annotations

import math
from functools import lru_cache

# Largest relative error of the number that a sum of so many bf16 numbers stands for. For two, with what 24 additions in
# tensor cores, which truncate, take from sums of 128 rows; for three, with that of one tile.
_UNIT_ROUNDOFF = {2: 1.2 * 2.0**-17, 3: 2.0**-22}
# The sum over the steps of S's relative error where S should be a: up to twice as much the accuracy rule holds on every
# spectrum of checks/matrices.py.
_ALLOWED_CHANGE = 4.0


@lru_cache(maxsize=256)
def terms_needed(triples: tuple[tuple[float, float, float], ...], margin: float) -> int | None:
    """Return two, three, or None if three are not enough.

    An eigenvalue of R that should be 0 is `loss` too small, negative, and so S is too large there: that multiplies the
    loss by S² in every step, while the step's own rounding adds to it. Small errors of Q do not matter, for they meet
    singular values of that size only. When Q is several times too large the iteration is about to explode.
    """
    for terms, roundoff in _UNIT_ROUNDOFF.items():
        loss, change = roundoff / margin**2, 0.0
        for a, b, c in triples:
            largest = abs(a) + abs(b) * loss + abs(c) * loss * loss
            change += largest / abs(a) - 1 if a else math.inf
            loss = loss * largest * largest + roundoff * (1 + abs(a))
        if change <= _ALLOWED_CHANGE:  # not so if it is NaN
            return terms
    return None
