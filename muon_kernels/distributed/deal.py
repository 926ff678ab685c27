"""Who orthogonalizes what."""

from __future__ import annotations

from collections.abc import Sequence


def deal(
    costs: Sequence[int], ranks: int, *, among: Sequence[Sequence[int] | None] = (), loads: Sequence[int] = ()
) -> list[int]:
    """The rank of every piece of work, so that the most loaded one has little more than the mean.

    The costliest first, each to the rank with the least so far (Graham's LPT rule: at most 4/3 of the best deal). Ranks
    that are given the same arguments come to the same result.

    Args:
        costs: of the pieces.
        ranks: how many there are.
        among: for every piece, who may have it; None for any.
        loads: what ranks have already.
    """
    total = list(loads) or [0] * ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        candidates = (among[index] if among else None) or range(ranks)
        owner = min(candidates, key=total.__getitem__)
        owners[index] = owner
        total[owner] += costs[index]
    return owners
