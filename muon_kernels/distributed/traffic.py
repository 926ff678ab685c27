"""Costs of a step of several ranks, bytes and FLOPs, by formula: for any number of ranks, without any of them.

`owners` counts what exchange.py does, to the byte; alternatives.py counts what other implementations do. Bytes sent are
those of a ring: where B bytes are gathered or scattered over N ranks, each sends B (N - 1) / N; of unequal shares it
sends all but the next rank's; where bytes are summed it sends 2 B (N - 1) / N. Gradients and parameters travel besides,
whatever the optimizer: see `BESIDE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..coefficients import DEFAULT, Schedule, resolve
from ..step.options import StepOptions
from ..step.plan import Bucket, plan_bucket, plan_for_shapes
from .balance import deal
from .gathers import GATHERS, Run, cut, part_bytes
from .placement import chunk
from .slices import IN_FLIGHT, NORM_BYTES, Rectangle, bytes_in_flight, matrices_in_round, record_bytes, share_bytes

Shapes = Sequence[tuple[int, int, int]]  # (rows, columns, how many)

# Bytes an element that every rank sends in a step, without the factor (N - 1) / N; all in fp32. Gradients are reduced
# and, unless they are sharded, gathered. Sharded parameters are gathered once, or by FSDP2 before each of two passes.
BESIDE = {"ZeRO-1": 4 + 4, "DDP": 4 + 4, "FSDP2": 4 + 2 * 4}


class Mesh(NamedTuple):
    """Ranks that shard the rows of every matrix, times those that shard its columns, times replicas.

    FSDP2 is rows=N, hybrid sharding rows=N and replicas=R, tensor parallelism rows=T or cols=T, DDP replicas=N.
    """

    rows: int = 1
    cols: int = 1
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Number of ranks that together hold every matrix once."""
        return self.rows * self.cols

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.shards * self.replicas

    def rectangles(self, rows: int, cols: int) -> list[Rectangle]:
        """Return the rectangle of a matrix that each of the shards holds."""
        down = [chunk((0, rows), self.rows, i) for i in range(self.rows)]
        across = [chunk((0, cols), self.cols, j) for j in range(self.cols)]
        empty = Rectangle(0, 0, 0, 0)
        return [
            empty if top == bottom or left == right else Rectangle(top, left, bottom - top, right - left)
            for (top, bottom), (left, right) in product(down, across)
        ]


class Cost(NamedTuple):
    """Costs of one step on one rank.

    Attributes:
        sent: bytes that the optimizer sends to other ranks.
        state: bytes that are kept between steps.
        workspace: bytes of the memory in which matrices are multiplied.
        buffers: bytes of messages under way.
        flops: FLOPs that are executed.
        collectives: calls.
    """

    sent: float
    state: float
    workspace: int
    buffers: int
    flops: float
    collectives: float


@dataclass(eq=False)
class _Lot:
    """Equal matrices that are sharded in the same way.

    Attributes:
        plan: of one matrix.
        shards: what each shard holds.
        owned: number of matrices that each owner has; all are there before a property is asked for.
        cap: bytes that a round may take.
    """

    plan: Bucket
    shards: tuple[Rectangle, ...]
    owned: list[int]
    cap: int

    @cached_property
    def records(self) -> list[int]:
        """Bytes of a slice, by shard."""
        return [record_bytes(shard.elements) for shard in self.shards]

    @cached_property
    def round_size(self) -> int:
        """Number of one owner's matrices in a round."""
        (m, n), sharded = self.plan.shape, len(self.shards) > 1
        return matrices_in_round(max(self.owned), bytes_in_flight(self.plan.workspace_bytes, m * n, sharded), self.cap)

    @property
    def rounds(self) -> list[list[int]]:
        """Number of matrices in each round, by owner."""
        size = self.round_size
        return [[max(0, min(size, n - start)) for n in self.owned] for start in range(0, max(self.owned), size)]


class SlicedRound(NamedTuple):
    """Round of matrices that are cut: slices go to owners, and slices of the results come back.

    Attributes:
        plan: of one matrix.
        elements, records: of a slice and its bytes, by shard.
        taken: number of matrices, by owner.
        by_replica: number of matrices, by replica.
        parts: in which several replicas gather the results.
    """

    plan: Bucket
    elements: list[int]
    records: list[int]
    taken: list[int]
    by_replica: list[int]
    parts: list[list[Run]]


class CopiedRound(NamedTuple):
    """Round of matrices of which every rank has copies.

    Attributes:
        works: the plan of one matrix and the number of matrices by owner, of each lot.
        records: bytes of a result, by lot.
        shares: bytes of the results of every rank.
        parts: in which they are gathered.
    """

    works: list[tuple[Bucket, list[int]]]
    records: list[int]
    shares: list[int]
    parts: list[list[Run]]

    def bytes_of(self, part: list[Run]) -> int:
        """Return the bytes of a part."""
        return sum(run.matrices * self.records[run.lot] for run in part)


@lru_cache(maxsize=1024)
def plan_part(m: int, n: int, schedule: Schedule, backend: str) -> Bucket:
    """Return the plan of m x n, the columns of a matrix of m rows that a rank has; they may be fewer than the rows."""
    return plan_bucket((m, n), 1, StepOptions(schedule), backend, bytes_per_element=0, stepped=False)


def _assigned(shapes: Shapes, mesh: Mesh, schedule: Schedule | None, backend: str) -> list[_Lot]:
    """Return lots with their owners, assigned as ranks.py does for copies and exchange.py for sharded matrices."""
    cap = backends.get(backend).default_workspace_bytes
    return _dealt(tuple(shapes), mesh, schedule or resolve(DEFAULT), backend, cap)


@lru_cache(maxsize=4)
def _dealt(
    shapes: tuple[tuple[int, int, int], ...], mesh: Mesh, schedule: Schedule, backend: str, cap: int
) -> list[_Lot]:
    lots: dict[tuple[int, int, tuple[Rectangle, ...]], _Lot] = {}
    members: list[list[tuple[_Lot, int]]] = []  # of equal matrices, their lot and cost
    for rows, cols, count in shapes:
        m, n, shards = min(rows, cols), max(rows, cols), mesh.rectangles(rows, cols)
        if rows > cols:
            shards = [Rectangle(left, top, c, r) for top, left, r, c in shards]
        plan = plan_part(m, n, schedule, backend)
        lot = lots.setdefault((m, n, tuple(shards)), _Lot(plan, tuple(shards), [0] * mesh.ranks, cap))
        cost = plan.flops
        if mesh.shards == 1:
            cost = plan_for_shapes([(m, n, 1)], schedule=schedule, backend=backend, available=False).flops
        members.append([(lot, cost)] * count)
    if mesh.shards > 1:
        order = {id(lot): i for i, lot in enumerate(lots.values())}
        members.sort(key=lambda equal: order[id(equal[0][0])] if equal else -1)
    pieces = [piece for equal in members for piece in equal]
    among: list[list[int] | None] = []
    for equal in members:
        holders = [i for i, shard in enumerate(equal[0][0].shards) if shard.elements] if equal else []
        alone = mesh.shards > 1 and len(holders) == 1
        nearby = [r * mesh.shards + holders[0] for r in range(mesh.replicas)] if alone else None
        among += [nearby] * len(equal)
    owners = deal([cost for _, cost in pieces], mesh.shards, mesh.replicas, among)
    for (lot, _), owner in zip(pieces, owners, strict=True):
        lot.owned[owner] += 1
    return list(lots.values())


def owners(
    shapes: Shapes, mesh: Mesh, *, schedule: Schedule | None = None, backend: str = "cuda", state_bytes: int = 4
) -> list[Cost]:
    """Return the costs of every rank if each matrix has an owner who orthogonalizes it, as in this package.

    Args:
        shapes: of the parameters.
        mesh: where they are.
        schedule, backend: as in a step.
        state_bytes: bytes of an element of the momentum.
    """
    lots = _assigned(shapes, mesh, schedule, backend)
    return (_copied if mesh.shards == 1 else _sharded)(lots, mesh, state_bytes)


def rounds(
    shapes: Shapes, mesh: Mesh, *, schedule: Schedule | None = None, backend: str = "cuda"
) -> list[SlicedRound] | list[CopiedRound]:
    """Return the rounds of which `owners` counts the costs, in the order in which they begin."""
    lots = _assigned(shapes, mesh, schedule, backend)
    if mesh.shards == 1:
        return _joined(lots)
    return sorted(_sliced(lots), key=lambda each: each.taken.count(0))


def _multiplied(lots: Sequence[_Lot]) -> tuple[Tensor, Tensor]:
    """Return the bytes of workspace and the FLOPs of every rank."""
    workspace, flops = (torch.zeros(len(lots[0].owned), dtype=torch.int64) for _ in range(2))
    for lot in lots:
        owned = torch.tensor(lot.owned)
        workspace = workspace.maximum(owned.clamp_max(lot.round_size) * lot.plan.workspace_bytes)
        flops += owned * lot.plan.flops
    return workspace, flops


def _norms(lots: Sequence[_Lot]) -> int:
    """Return the bytes of the norms in a set of buffers."""
    return NORM_BYTES * max(max(lot.owned) for lot in lots) * len(lots[0].shards)


def _copied_round(taken: Sequence[tuple[_Lot, list[int]]]) -> CopiedRound:
    """Return the round of these lots, each with the number of matrices by owner."""
    records, counts = [lot.records[0] for lot, _ in taken], list(zip(*(own for _, own in taken), strict=True))
    shares = [sum(map(mul, own, records)) for own in counts]
    parts = cut(counts, records, part_bytes(max(lot.cap for lot, _ in taken)))
    return CopiedRound([(lot.plan, own) for lot, own in taken], records, shares, parts)


def _sliced(lots: Sequence[_Lot]) -> list[SlicedRound]:
    found = []
    for lot in lots:
        shards = len(lot.shards)
        for taken in lot.rounds:
            by_replica = [sum(taken[i : i + shards]) for i in range(0, len(taken), shards)]
            several, record = len(by_replica) > 1, max(lot.records)
            parts = cut([[count] for count in by_replica], [record], part_bytes(lot.cap)) if several else []
            sizes = [shard.elements for shard in lot.shards]
            found.append(SlicedRound(lot.plan, sizes, lot.records, taken, by_replica, parts))
    return found


def _joined(lots: Sequence[_Lot]) -> list[CopiedRound]:
    """Return the rounds of copies, joined until a share is worth a collective."""
    ranks = len(lots[0].owned)
    found: list[CopiedRound] = []
    waiting: list[tuple[_Lot, list[int]]] = []
    own, enough = [0] * ranks, share_bytes(max(lot.cap for lot in lots), ranks)
    for lot in lots:
        for taken in lot.rounds:
            waiting.append((lot, taken))
            own = [before + n * lot.records[0] for before, n in zip(own, taken, strict=True)]
            if max(own) >= enough:
                found.append(_copied_round(waiting))
                waiting, own = [], [0] * ranks
    return [*found, _copied_round(waiting)] if waiting else found


def _copied(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where every rank has copies: each does its share and all gather the results."""
    joined, norms = _joined(lots), _norms(lots)
    workspace, flops = _multiplied(lots)
    held = torch.tensor([[lot.shards[0].elements * n for n in lot.owned] for lot in lots]).sum(0)
    shares = torch.tensor([each.shares for each in joined])
    sizes = [each.bytes_of(part) for each in joined for part in each.parts]
    sent = (shares.sum(1, keepdim=True) - shares.roll(-1, 1)).sum(0)
    buffers = min(IN_FLIGHT, len(joined)) * (shares.amax(0) + norms) + min(GATHERS, len(sizes)) * max(sizes)
    return _by_rank(sent, state_bytes * held, workspace, buffers, flops, len(sizes))


def _by_rank(
    sent: Tensor, state: Tensor, workspace: Tensor, buffers: Tensor, flops: Tensor, collectives: int
) -> list[Cost]:
    """Return the costs of every rank."""
    columns = (each.tolist() for each in (sent, state, workspace, buffers, flops))
    return [
        Cost(sent_, state_, workspace_, buffers_, flops_, collectives)
        for sent_, state_, workspace_, buffers_, flops_ in zip(*columns, strict=True)
    ]


def _sharded(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where each rank sends its slices to owners and gets slices of the results back."""
    sent, slices, owned, gathered, state = (torch.zeros(mesh.ranks, dtype=torch.int64) for _ in range(5))
    sliced = _sliced(lots)
    for each in sliced:
        own, whole, share = torch.tensor(each.taken), sum(each.records), max(each.by_replica)
        here = torch.tensor(each.by_replica).repeat_interleave(mesh.shards)
        record = torch.tensor(each.records).repeat(mesh.replicas)
        sent += (here - own) * record + own * (whole - record)
        if mesh.replicas > 1:
            sent += (sum(each.by_replica) - here.roll(-mesh.shards)) * record
            gathered = gathered.maximum(max(sum(run.matrices for run in part) for part in each.parts) * record)
        slices = slices.maximum(share * record)
        owned = owned.maximum(own * whole)
    for lot in lots:
        held = torch.tensor([shard.elements for shard in lot.shards]).repeat(mesh.replicas)
        state += state_bytes * sum(lot.owned) * held
    parts = sum(len(each.parts) for each in sliced)
    buffers = min(IN_FLIGHT, len(sliced)) * (slices + owned + _norms(lots)) + min(GATHERS, parts) * gathered
    workspace, flops = _multiplied(lots)
    return _by_rank(sent, state, workspace, buffers, flops, 2 * len(sliced) + parts)


def flops(shapes: Shapes, *, schedule: Schedule | None = None, backend: str = "cuda") -> list[int]:
    """Return the FLOPs of every matrix."""
    plans = [(plan_part(*sorted((m, n)), schedule or resolve(DEFAULT), backend), count) for m, n, count in shapes]
    return [plan.flops for plan, count in plans for _ in range(count)]


def plan_of(rows: int, cols: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Bucket:
    """Return the plan of one matrix's iteration."""
    return plan_part(*sorted((rows, cols)), schedule or resolve(DEFAULT), backend)


def elements(shapes: Shapes) -> int:
    """Return the number of elements of all parameters."""
    return sum(rows * cols * count for rows, cols, count in shapes)


def largest(costs: Sequence[Cost]) -> Cost:
    """Return the most that any rank has, field by field."""
    return Cost(*map(max, zip(*costs, strict=True)))
