"""Assignment of work to ranks: who orthogonalizes what."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate

# Up to this multiple of the mean the result of LPT is kept: it gives every rank about as many pieces of each cost, so
# that ranks also send and wait less.
_GOOD = 1.1
# Halvings of the interval between the lower bound and the best result so far.
_TRIES = 10


def assign_owners(
    costs: Sequence[int], ranks: int, *, among: Sequence[Sequence[int] | None] = (), loads: Sequence[int] = ()
) -> list[int]:
    """Return the rank that does each piece of work, so that the most loaded rank has little more than the mean.

    The costliest piece comes first, and each goes to the rank that has the least so far: Graham's LPT rule, at most
    4/3 of the optimum. Where the result is not good enough, each piece goes to the first rank whose load stays below a
    bound, and halving finds the smallest bound: MULTIFIT, at most 13/11 of the optimum (Coffman, Garey and Johnson).
    Ranks that are given the same arguments come to the same result.

    Args:
        costs: of each piece.
        ranks: how many there are.
        among: for each piece, the ranks that may have it; None for any.
        loads: what each rank has already.
    """
    before = list(loads) or [0] * ranks
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    everybody = range(ranks)
    candidates = [(among[i] if among else None) or everybody for i in range(len(costs))]
    owners, total = _longest_first(costs, order, candidates, everybody, before)
    low, high = least_load(costs, ranks, before), max(total)
    for _ in range(_TRIES if high * ranks > _GOOD * sum(total) else 0):
        if low >= high:
            break
        bound = (low + high) // 2
        found = _first_fit(costs, order, candidates, before, bound)
        if found is None:
            low = bound + 1
        else:
            owners, high = found
    return owners


def deal(costs: Sequence[int], shards: int, replicas: int, among: Sequence[Sequence[int] | None]) -> list[int]:
    """Return the owner of each piece of work among replicas of so many shards, see `assign_owners`.

    Of ranks that have as much the first of each replica comes first, so that all replicas get about as many matrices:
    what they gather of one another then is of about equal shares.
    """
    order = [replica * shards + shard for shard in range(shards) for replica in range(replicas)]
    places = {rank: place for place, rank in enumerate(order)}
    known = {id(some): [places[rank] for rank in some] for some in among if some is not None}  # mostly a few
    candidates = [None if some is None else known[id(some)] for some in among]
    return [order[place] for place in assign_owners(costs, len(order), among=candidates)]


def least_load(costs: Sequence[int], ranks: int, loads: Sequence[int] = ()) -> int:
    """Return a lower bound of the largest load, however the pieces are assigned.

    It is the largest of: the mean; what a rank has already; and, for any k, the sum of the k + 1 cheapest of the
    k·ranks + 1 costliest pieces, since some rank has to take k + 1 of these.
    """
    before = [0, *accumulate(sorted(costs, reverse=True))]  # the costs of the so many costliest
    bound = max(-(-(before[-1] + sum(loads)) // ranks), max(loads, default=0))
    for k in range((len(costs) - 1) // ranks + 1 if costs else 0):
        bound = max(bound, before[k * ranks + 1] - before[k * (ranks - 1)])
    return bound


def _longest_first(
    costs: Sequence[int],
    order: Sequence[int],
    candidates: Sequence[Sequence[int]],
    everybody: Sequence[int],
    loads: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Return (owners, the load of every rank) if each piece, in `order`, goes to the rank that has the least so far.

    Of equal ranks it is the first. A heap finds it: thousands of ranks are not looked through for each of thousands of
    pieces.
    """
    owners, total = [0] * len(order), [*loads]
    heap = [(load, rank) for rank, load in enumerate(total)]
    heapify(heap)
    for i in order:
        if candidates[i] is everybody:
            while heap[0][0] != total[heap[0][1]]:  # it has got a piece since
                heappop(heap)
            owner = heap[0][1]
        else:
            owner = min(candidates[i], key=total.__getitem__)
        owners[i] = owner
        total[owner] += costs[i]
        heappush(heap, (total[owner], owner))
    return owners, total


def _first_fit(
    costs: Sequence[int],
    order: Sequence[int],
    candidates: Sequence[Sequence[int]],
    loads: Sequence[int],
    bound: int,
) -> tuple[list[int], int] | None:
    """Return (owners, the largest load) with every load at most `bound`, or None if a piece does not fit."""
    owners, total = [0] * len(costs), list(loads)
    before, start = None, 0
    for i in order:
        # Where a piece did not fit, an equal one does not either: begin at the place of the last one.
        kind = costs[i], id(candidates[i])
        if kind != before:
            before, start = kind, 0
        for place in range(start, len(candidates[i])):
            owner = candidates[i][place]
            if total[owner] + costs[i] <= bound:
                owners[i], start = owner, place
                total[owner] += costs[i]
                break
        else:
            return None
    return owners, max(total)
