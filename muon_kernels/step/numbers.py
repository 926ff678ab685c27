"""Numbers of an optimizer's matrices, by which stochastic rounding tells them apart.

A matrix has the same number in every step and on every rank: parameters are counted as their group lists them, with or
without a gradient, and the matrices of one as the whole parameter has them, however ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..layout import flattens
from ..split import pieces
from .options import splits

# Numbers are below this; in the lower of their bits they count the matrices of a group.
NUMBERS = 1 << 30
_BITS_IN_GROUP = 18


@lru_cache(maxsize=65536)
def _stack_of(shape: tuple[int, ...], flatten: bool | None, split: str | None) -> tuple[tuple[int, ...], int]:
    """Return the sizes of the dimensions that count matrices, and the number of parts that each is split into."""
    parts = sum(1 if piece is None else piece.parts for piece in pieces(shape, flatten, split))
    return () if flattens(shape, flatten) else shape[:-2], parts


def first_numbers(group: Mapping[str, Any], index: int) -> list[int]:
    """Return the number of the first matrix of every parameter of a group, which has this index among all groups.

    Modulo `NUMBERS` they are unique in 2^12 groups of 2^18 matrices.
    """
    found, number = [], index << _BITS_IN_GROUP
    for p, split in splits(group):
        found.append(number)
        leading, parts = _stack_of(tuple(p.shape), group["flatten"], split)
        number += math.prod(leading) * parts
    return found


def numbers_of(
    first: int,
    shape: tuple[int, ...],
    flatten: bool | None,
    split: str | None,
    held: Sequence[tuple[int, int]] | None = None,
) -> list[int]:
    """Return for every matrix of a parameter the number of its first part; numbers are to be taken modulo `NUMBERS`.

    Args:
        first: number of the whole parameter's first matrix.
        shape: of the whole parameter.
        flatten, split: see `Muon`.
        held: what of every dimension this rank holds, as (start, stop); None for all.
    """
    leading, parts = _stack_of(shape, flatten, split)
    ranges = [(0, n) for n in leading] if held is None else held[: len(leading)]
    places = [0]
    for n, (start, stop) in zip(leading, ranges, strict=True):
        places = [place * n + i for place in places for i in range(start, stop)]
    return [first + place * parts for place in places]
