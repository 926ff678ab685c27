"""Results that replicas gather of one another, part by part, in memory of a stated size.

A rank that has all results of a round at once would hold one matrix of every owner. So the results of all replicas, one
replica's after another's, are cut into parts of at most half of the cap on the workspace, or of one matrix. Each part
is gathered by itself, every replica's share of it in its own size. Two parts are under way at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .collectives import Pending, gather
from .placement import Team
from .slices import Slices

# Number of parts under way at a time; each has memory of its own. It is the number of rounds by which results are
# waited for late: the memory of a round's results is free again when those of the second round after it are ready.
GATHERS = 2


class Run(NamedTuple):
    """Equal matrices of one replica that follow one another in its results, from the `start`-th of a lot on."""

    replica: int
    lot: int
    start: int
    matrices: int


class Part(NamedTuple):
    """Results that are gathered at once.

    Attributes:
        runs: each with where it is in what is gathered.
        sizes: bytes of each replica.
        begin: where this rank's bytes begin in its results.
    """

    runs: list[tuple[Run, Slices]]
    sizes: list[int]
    begin: int


def part_bytes(cap: int) -> int:
    """Return the bytes of a part, so that all under way take at most `cap`, unless one matrix takes more."""
    return cap // GATHERS


def cut(counts: Sequence[Sequence[int]], records: Sequence[int], most: int) -> list[list[Run]]:
    """Divide the results of all replicas into parts of at most `most` bytes, or of one matrix.

    Args:
        counts: number of matrices, by replica and lot.
        records: bytes of a matrix, by lot; where ranks hold shards of it, of the largest, so that all cut alike.
        most: bytes of a part.
    """
    parts: list[list[Run]] = []
    room = 0
    for replica, of_lots in enumerate(counts):
        for lot, (count, record) in enumerate(zip(of_lots, records, strict=True)):
            start = 0
            while start < count:
                if room < record:
                    parts.append([])
                    room = most
                taken = min(count - start, max(1, room // record))
                parts[-1].append(Run(replica, lot, start, taken))
                start, room = start + taken, room - taken * record
    return parts


def parts_of(places: Sequence[Sequence[Slices]], records: Sequence[int], most: int, replica: int) -> list[Part]:
    """Return the parts in which a round's results are gathered.

    Args:
        places: where each replica has the matrices of each lot in its results.
        records, most: see `cut`.
        replica: this rank's.
    """
    found = []
    for runs in cut([[place.matrices for place in own] for own in places], records, most):
        sizes, placed, begin = [0] * len(places), [], 0
        for run in runs:
            place = places[run.replica][run.lot]
            if run.replica == replica and not sizes[replica]:
                begin = place.offset + run.start * place.record
            placed.append((run, Slices(sum(sizes), run.matrices, place.shard)))
            sizes[run.replica] += placed[-1][1].bytes
        found.append(Part(placed, sizes, begin))
    return found


def sent_by(replica: int, shares: Sequence[int]) -> int:
    """Return the bytes that a replica sends where each share goes around a ring: all but those of the next one."""
    return sum(shares) - shares[(replica + 1) % len(shares)]


class Gathers:
    """Parts on their way, on all replicas in the same order: those offered first begin first, as memory is free."""

    def __init__(self, team: Team, memory: Sequence[Tensor]) -> None:
        """Take the memory of each part under way, in bytes, all equal."""
        self._team, self._memory = team, memory
        self.clear()

    def clear(self) -> None:
        """Forget parts that a step has left behind which did not complete."""
        self._free = list(self._memory)
        self._waiting: deque[tuple[Part, Tensor, str]] = deque()
        self._begun: deque[tuple[Pending, Tensor]] = deque()

    def offer(self, results: Tensor, parts: Sequence[Part], of: str) -> None:
        """Begin to gather parts, of which this rank has the bytes in `results`; `of` names them in an error."""
        self._waiting.extend((part, results, of) for part in parts)
        self._begin()

    def _begin(self) -> None:
        while self._free and self._waiting:
            part, results, of = self._waiting.popleft()
            into = self._free.pop()
            own = results[part.begin : part.begin + part.sizes[self._team.replica]]
            self._begun.append((gather(into[: sum(part.sizes)], own, part.sizes, self._team, of), into))

    def take(self, parts: Sequence[Part]) -> Iterator[tuple[Run, Slices, Tensor]]:
        """Wait for parts, the first that were offered; yield their runs with the memory that they are in.

        The memory of a part is used again when the next part is asked for.
        """
        for part in parts:
            pending, into = self._begun.popleft()
            pending.wait()
            for run, place in part.runs:
                yield run, place, into
            self._free.append(into)
            self._begin()
