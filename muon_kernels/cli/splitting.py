"""Estimate of a step in which several ranks of a node share a matrix: no strategy here does that yet.

A rank has a part of the columns. Ranks sum their Gram matrices, as strategy "gram" does, wherever the iteration visits
the matrix, and each of them does the products of the smaller side. So a matrix is done sooner, with more work in all,
which can pay only where ranks have a matrix or two at most. What went to one owner goes to several, each by its card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from .. import backends
from ..coefficients import Schedule
from ..distributed import traffic
from ..distributed.balance import assign_owners
from ..distributed.gathers import cut, part_bytes
from ..distributed.slices import bytes_in_flight, matrices_in_round, record_bytes
from ..distributed.strategies.gram import GramRound, count
from ..distributed.traffic import CopiedRound, Mesh, SlicedRound
from ..step.options import StepOptions
from ..step.plan import Bucket, plan_bucket
from .estimate import Gpu, square_seconds
from .layouts import Layouts, Row
from .models import Model
from .network import Network
from .overlap import Stage, overlapped

BETWEEN = (2, 4, 8)  # ranks that share a matrix


class Kind(NamedTuple):
    """Equal matrices, or parts of their columns.

    Attributes:
        rows, cols: as a model has them.
        matrices: how many.
        between: ranks that share each.
        plan: of what each of these iterates.
        visits: sums of squares in an iteration.
    """

    rows: int
    cols: int
    matrices: int
    between: int
    plan: Bucket
    visits: int


@lru_cache(maxsize=256)
def _plan(m: int, n: int, between: int, schedule: Schedule, backend: str) -> tuple[Bucket, int]:
    """Return the plan of a part, and the visits to it."""
    if between == 1:
        return traffic.plan_of(m, n, schedule=schedule, backend=backend), 0
    form, cols = GramRound.algorithm("auto", backend), -(-n // between)
    options = StepOptions(schedule, ns_algorithm=form)
    plan = plan_bucket((m, cols), 1, options, backend, bytes_per_element=0, stepped=False)
    return plan, count(backend, plan.algorithm, m, cols, schedule)[0]


class Splitting:
    """Estimates of a model's step on so many ranks, with whole matrices and with some that are shared."""

    def __init__(self, model: Model, ranks: int, gpu: Gpu, schedule: Schedule) -> None:
        """Take what both have in common."""
        self.network = Network(gpu.nvlink)
        self.layouts = Layouts(model, ranks, gpu, schedule, self.network)
        self.step, self.ranks, self.backend = self.layouts.step, ranks, self.layouts.backend
        self.cap = backends.get(self.backend).default_workspace_bytes

    def kinds(self, between: int) -> list[Kind]:
        """Return all kinds of matrices, each shared between so many ranks; the costliest first."""
        found = []
        for rows, cols, matrices in self.layouts.shapes:
            plan, visits = _plan(*sorted((rows, cols)), between, self.step.schedule, self.backend)
            found.append(Kind(rows, cols, matrices, between, plan, visits))
        whole = [self.step.iteration(self.layouts.plan(each.rows, each.cols), 1) for each in found]
        return [found[i] for i in sorted(range(len(found)), key=lambda i: -whole[i])]

    def seconds(self, kind: Kind, matrices: int) -> float:
        """Return the seconds in which a rank does its parts of so many matrices at a time, with the sums."""
        if not matrices:
            return 0.0
        m, cols = kind.plan.shape
        # The second product of a visit returns what rounding took from the first, see strategies/gram.py.
        again = square_seconds(m, cols, matrices, self.step.gpu)
        summed = self.network.reduce(matrices * 2 * m * (m + 1), self.network.group(kind.between)).both
        return self.step.iteration(kind.plan, matrices) + kind.visits * (again + summed)

    def dealt(self, kinds: Sequence[Kind]) -> tuple[list[list[int]], float]:
        """Return what each rank has of each kind, and the seconds of the slowest one by one; shared kinds first."""
        loads, taken = [0] * self.ranks, []
        for kind in kinds:
            cost = round(1e9 * self.seconds(kind, 1))
            teams = [max(loads[i : i + kind.between]) for i in range(0, self.ranks, kind.between)]
            own = [0] * self.ranks
            for team in assign_owners([cost] * kind.matrices, len(teams), loads=teams):
                for rank in range(team * kind.between, (team + 1) * kind.between):
                    own[rank] += 1
            loads = [load + cost * n for load, n in zip(loads, own, strict=True)]
            taken.append(own)
        return taken, max(loads) / 1e9

    @cached_property
    def best(self) -> tuple[list[Kind], list[list[int]]] | None:
        """The kinds and their deal of the shortest iteration with some that are shared; None if no such is shorter."""
        whole = self.kinds(1)
        shortest, found = self.dealt(whole)[1], None
        # Shared matrices are more work: where ranks have about the same, none is done sooner.
        if shortest <= 1.05 * sum(each.matrices * self.seconds(each, 1) for each in whole) / self.ranks:
            return None
        for between in BETWEEN:
            shared = self.kinds(between) if self.ranks % between == 0 else []
            for number in range(1, len(shared) + 1):
                kinds = [*shared[:number], *whole[number:]]
                work = sum(each.matrices * each.between * self.seconds(each, 1) for each in kinds)
                if work / self.ranks >= shortest:
                    continue
                taken, seconds = self.dealt(kinds)
                if seconds < shortest:
                    shortest, found = seconds, (kinds, taken)
        return found

    def stages(self, kinds: Sequence[Kind], taken: Sequence[list[int]], sharded: bool) -> Iterator[Stage]:
        """Yield the times of rounds, under FSDP2 or DDP."""
        for kind, own in zip(kinds, taken, strict=True):
            (m, n), most = kind.plan.shape, max(own)
            size = matrices_in_round(most, bytes_in_flight(kind.plan.workspace_bytes, m * n, sharded), self.cap)
            for start in range(0, most, size):
                now = [max(0, min(size, each - start)) for each in own]
                stage = (self._sliced if sharded else self._copied)(kind, now)
                more = {each: self.seconds(kind, each) - self.step.iteration(kind.plan, each) for each in {*now}}
                yield stage._replace(iterate=stage.iterate + torch.tensor([more[n] for n in now], dtype=torch.float64))

    def _sliced(self, kind: Kind, taken: list[int]) -> Stage:
        shards = Mesh(rows=self.ranks).rectangles(kind.rows, kind.cols)
        sizes = [-(-shard.elements // kind.between) for shard in shards]
        each = SlicedRound(kind.plan, sizes, [record_bytes(size) for size in sizes], taken, [], [])
        return self.step.sliced(each, self.network.group(self.ranks), self.network.group(1, self.ranks))

    def _copied(self, kind: Kind, taken: list[int]) -> Stage:
        (m, n), counts = kind.plan.shape, [[each] for each in taken]
        records = [record_bytes(m * n)]
        parts = cut(counts, records, part_bytes(self.cap))
        each = CopiedRound([(kind.plan, taken)], records, [each * records[0] for each in taken], parts)
        return self.step.copied(each, self.network.group(self.ranks))

    def line(self, row: Row) -> list[str]:
        """Return a line of the table, see `HEAD`, beside a layout of whole matrices, under FSDP2 or DDP."""
        whole, best, sharded = row.timeline, self.best, row.name == SHARDED
        line = [str(self.ranks), row.name, *_times(whole.iterating, whole.seconds)]
        if best is None:
            return [*line, "", "", "none", ""]
        kinds, taken = best
        shared = overlapped(
            sorted(self.stages(kinds, taken, sharded), key=lambda stage: int((stage.iterate == 0).sum()))
        )
        several = [kind for kind in kinds if kind.between > 1]
        which = " and ".join(f"{kind.rows}x{kind.cols}" for kind in several)
        which += f", {several[0].between} ranks a matrix"
        gain = f"{1 - shared.seconds / whole.seconds:.0%}"
        return [*line, *_times(shared.iterating, shared.seconds), which, gain]


SHARDED, COPIED = "owners, FSDP2", "owners, DDP"
HEAD = (
    *("ranks", "layout", "est. iteration, ms", "est. step, ms"),
    *("shared: est. iteration, ms", "est. step, ms", "which are shared", "gain"),
)


def _times(*seconds: float) -> list[str]:
    return [f"{each * 1e3:,.1f}" for each in seconds]


def lines(model: Model, found: Sequence[Row], gpu: Gpu, schedule: Schedule) -> Iterator[list[str]]:
    """Yield the lines of a table of both, for the rows of FSDP2 and DDP among `found`."""
    splitting: dict[int, Splitting] = {}
    for row in found:
        if row.name in (SHARDED, COPIED):
            of_ranks = splitting.setdefault(row.ranks, Splitting(model, row.ranks, gpu, schedule))
            yield of_ranks.line(row)
