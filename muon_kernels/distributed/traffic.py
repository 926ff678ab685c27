"""Costs of a step of several ranks, bytes and FLOPs, by formula: for any number of ranks, without any of them.

`owners` counts what exchange.py does, to the byte; the other functions count what other implementations do. Bytes sent
are those of a ring: where B bytes are gathered or scattered over N ranks, each sends B (N - 1) / N; where they are
summed, twice that. Gradients and parameters travel besides, whatever the optimizer: see `BESIDE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

from .. import backends
from ..coefficients import DEFAULT, Schedule, resolve
from ..segments import segments
from ..step.options import StepOptions
from ..step.plan import Bucket, plan_bucket, plan_for_shapes
from .balance import assign_owners
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
        found = []
        for i, j in product(range(self.rows), range(self.cols)):
            (top, bottom), (left, right) = chunk((0, rows), self.rows, i), chunk((0, cols), self.cols, j)
            empty = top == bottom or left == right
            found.append(Rectangle(0, 0, 0, 0) if empty else Rectangle(top, left, bottom - top, right - left))
        return found


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


class _Lot(NamedTuple):
    """Equal matrices that are sharded in the same way.

    Attributes:
        plan: of one matrix.
        shards: what each shard holds.
        owned: number of matrices that each owner has.
    """

    plan: Bucket
    shards: tuple[Rectangle, ...]
    owned: list[int]

    @property
    def cap(self) -> int:
        """Bytes that a round may take."""
        return backends.get(self.plan.backend).default_workspace_bytes

    @property
    def records(self) -> list[int]:
        """Bytes of a slice, by shard."""
        return [record_bytes(shard.elements) for shard in self.shards]

    @property
    def round_size(self) -> int:
        """Number of one owner's matrices in a round."""
        (m, n), replicas = self.plan.shape, len(self.owned) // len(self.shards)
        return matrices_in_round(max(self.owned), bytes_in_flight(self.plan.workspace_bytes, m * n, replicas), self.cap)

    @property
    def rounds(self) -> list[list[int]]:
        """Number of matrices in each round, by owner."""
        size = self.round_size
        return [[max(0, min(size, n - start)) for n in self.owned] for start in range(0, max(self.owned), size)]


@lru_cache(maxsize=1024)
def _plan(m: int, n: int, schedule: Schedule, backend: str) -> Bucket:
    """Return the plan of one matrix."""
    return plan_bucket((m, n), 1, StepOptions(schedule), backend, bytes_per_element=0, stepped=False)


def _assigned(shapes: Shapes, mesh: Mesh, schedule: Schedule, backend: str) -> list[_Lot]:
    """Return lots with their owners, assigned as ranks.py does for copies and exchange.py for sharded matrices."""
    lots: dict[tuple[int, int, tuple[Rectangle, ...]], _Lot] = {}
    members: list[list[tuple[_Lot, int]]] = []  # of equal matrices, their lot and cost
    for rows, cols, count in shapes:
        m, n, shards = min(rows, cols), max(rows, cols), mesh.rectangles(rows, cols)
        if rows > cols:
            shards = [Rectangle(left, top, c, r) for top, left, r, c in shards]
        plan = _plan(m, n, schedule, backend)
        lot = lots.setdefault((m, n, tuple(shards)), _Lot(plan, tuple(shards), [0] * mesh.ranks))
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
    for (lot, _), owner in zip(
        pieces, assign_owners([cost for _, cost in pieces], mesh.ranks, among=among), strict=True
    ):
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
    lots = _assigned(shapes, mesh, schedule or resolve(DEFAULT), backend)
    return (_copied if mesh.shards == 1 else _sharded)(lots, mesh, state_bytes)


def _multiplied(lots: Sequence[_Lot], rank: int) -> tuple[int, int]:
    """Return the bytes of workspace and the FLOPs of a rank."""
    workspace = max((min(lot.round_size, lot.owned[rank]) * lot.plan.workspace_bytes for lot in lots), default=0)
    return workspace, sum(lot.owned[rank] * lot.plan.flops for lot in lots)


def _in_flight(rounds: int, slices: int, owned: int, lots: Sequence[_Lot]) -> int:
    norms = NORM_BYTES * max(max(lot.owned) for lot in lots) * len(lots[0].shards)
    return min(IN_FLIGHT, rounds) * (slices + owned + norms)


def _copied(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where every rank has copies: each does its share and all gather the results.

    Rounds are joined until a share is worth a collective.
    """
    shares, waiting, enough = [], [0] * mesh.ranks, share_bytes(max(lot.cap for lot in lots), mesh.ranks)
    for lot in lots:
        for taken in lot.rounds:
            waiting = [before + n * lot.records[0] for before, n in zip(waiting, taken, strict=True)]
            if max(waiting) >= enough:
                shares.append(max(waiting))
                waiting = [0] * mesh.ranks
    if any(waiting):
        shares.append(max(waiting))
    return [
        Cost(
            sent=sum(shares) * (mesh.ranks - 1),
            state=state_bytes * sum(lot.owned[rank] * lot.shards[0].elements for lot in lots),
            workspace=_multiplied(lots, rank)[0],
            buffers=_in_flight(len(shares), max(shares), max(shares) * mesh.ranks, lots),
            flops=_multiplied(lots, rank)[1],
            collectives=len(shares),
        )
        for rank in range(mesh.ranks)
    ]


def _sharded(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where each rank sends its slices to owners and gets slices of the results back."""
    sent, slices, owned, rounds = [0] * mesh.ranks, [0] * mesh.ranks, [0] * mesh.ranks, 0
    for lot in lots:
        records, whole = lot.records, sum(lot.records)
        for taken in lot.rounds:
            rounds += 1
            by_replica = [sum(taken[r * mesh.shards : (r + 1) * mesh.shards]) for r in range(mesh.replicas)]
            share = max(by_replica)
            for rank, own in enumerate(taken):
                replica, shard = divmod(rank, mesh.shards)
                here, record = by_replica[replica], records[shard]
                sent[rank] += (here - own) * record + own * (whole - record) + (mesh.replicas - 1) * share * record
                slices[rank] = max(slices[rank], share * record)
                owned[rank] = max(owned[rank], own * whole, (mesh.replicas > 1) * mesh.replicas * share * record)
    return [
        Cost(
            sent=sent[rank],
            state=state_bytes * sum(sum(lot.owned) * lot.shards[rank % mesh.shards].elements for lot in lots),
            workspace=_multiplied(lots, rank)[0],
            buffers=_in_flight(rounds, slices[rank], owned[rank], lots),
            flops=_multiplied(lots, rank)[1],
            collectives=rounds * (2 + (mesh.replicas > 1)),
        )
        for rank in range(mesh.ranks)
    ]


def flops(shapes: Shapes, *, schedule: Schedule | None = None, backend: str = "cuda") -> list[int]:
    """Return the FLOPs of every matrix."""
    plans = [(_plan(*sorted((m, n)), schedule or resolve(DEFAULT), backend), count) for m, n, count in shapes]
    return [plan.flops for plan, count in plans for _ in range(count)]


def elements(shapes: Shapes) -> int:
    """Return the number of elements of all parameters."""
    return sum(rows * cols * count for rows, cols, count in shapes)


def _ring(bytes_: float, ranks: int) -> float:
    """Return the bytes that a rank sends where so many are gathered or scattered."""
    return bytes_ * (ranks - 1) / ranks


def adamw(shapes: Shapes, ranks: int) -> Cost:
    """Return the cost of AdamW under ZeRO-1, whose state is two moments in fp32 of a slice of all parameters.

    It sends nothing but what is `BESIDE`.
    """
    return Cost(0, 8 * elements(shapes) / ranks, 0, 0, 0, 0)


def gathered(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost of Muon under ZeRO-1 by Algorithm 1 of https://arxiv.org/abs/2502.16982.

    Every rank gathers every matrix's direction in bf16, orthogonalizes it, and keeps its slice of the result.
    """
    schedule = schedule or resolve(DEFAULT)
    plans = [(_plan(*sorted((m, n)), schedule, backend), count) for m, n, count in shapes]
    return Cost(
        sent=_ring(2 * elements(shapes), ranks),
        state=4 * elements(shapes) / ranks,
        workspace=max(plan.workspace_bytes for plan, _ in plans),
        buffers=max(2 * m * n for m, n, _ in shapes),
        flops=sum(count * plan.flops for plan, count in plans),
        collectives=sum(count for _, _, count in shapes),
    )


def gram(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost where each rank multiplies its shard of the longer side and A = Σ Xᵢ Xᵢᵀ is summed in fp32.

    That takes 4 m² bytes each time that A is made of X: for every step in the standard form, for every segment in the
    Gram form. Polynomials of A are every rank's own. https://github.com/NVIDIA-NeMo/Emerging-Optimizers ("distributed")
    does so.
    """
    schedule = schedule or resolve(DEFAULT)
    sent = state = flops = collectives = 0.0
    workspace = buffers = 0
    for rows, cols, count in shapes:
        m, n = min(rows, cols), -(-max(rows, cols) // ranks)
        plan = _plan(m, n, schedule, backend)
        sums = len(schedule.triples)
        if plan.algorithm == "gram":
            sums = len(segments(schedule, m, backends.get(backend).precise_squares))
        sent += count * sums * 2 * _ring(4 * m * m, ranks)
        state += count * 4 * m * n
        flops += count * plan.flops
        collectives += count * sums
        workspace, buffers = max(workspace, plan.workspace_bytes), max(buffers, 4 * m * m)
    return Cost(sent, state, workspace, buffers, flops, collectives)


def blockwise(
    shapes: Shapes, mesh: Mesh, period: int, *, schedule: Schedule | None = None, backend: str = "cuda"
) -> list[Cost]:
    """Return the costs of MuonBP (https://arxiv.org/abs/2510.16981), the mean over a period of steps.

    One step of `period` has owners; in the others each rank orthogonalizes its own shards.
    """
    schedule = schedule or resolve(DEFAULT)
    alone = [0.0] * mesh.ranks
    for rows, cols, count in shapes:
        for rank, shard in enumerate(mesh.rectangles(rows, cols) * mesh.replicas):
            alone[rank] += count * _plan(*sorted((shard.rows, shard.cols)), schedule, backend).flops
    return [
        whole._replace(
            sent=whole.sent / period,
            flops=(whole.flops + (period - 1) * blocks) / period,
            collectives=whole.collectives / period,
        )
        for whole, blocks in zip(owners(shapes, mesh, schedule=schedule, backend=backend), alone, strict=True)
    ]


def largest(costs: Sequence[Cost]) -> Cost:
    """Return the most that any rank has, field by field."""
    return Cost(*map(max, zip(*costs, strict=True)))


def alternatives(
    shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda"
) -> Iterator[tuple[str, float, list[Cost]]]:
    """Yield (name, bytes that a rank sends beside, costs of every rank or of any) of each implementation.

    Nodes have 8 ranks.
    """
    of = partial(owners, shapes, schedule=schedule, backend=backend)
    zero, ddp, fsdp = (_ring(each * elements(shapes), ranks) for each in BESIDE.values())
    hybrid = _ring(BESIDE["FSDP2"] * elements(shapes), 8) + 2 * _ring(4 * elements(shapes) / 8, ranks // 8)
    parallel = 2 * _ring(4 * elements(shapes) / 8, ranks // 8)
    yield "AdamW, ZeRO-1", zero, [adamw(shapes, ranks)]
    yield "gathered, ZeRO-1", zero, [gathered(shapes, ranks, schedule=schedule, backend=backend)]
    yield "owners, DDP", ddp, of(Mesh(replicas=ranks))
    yield "owners, FSDP2", fsdp, of(Mesh(rows=ranks))
    yield "owners, FSDP2 in a node", hybrid, of(Mesh(rows=8, replicas=ranks // 8))
    yield "sums of X Xᵀ, TP of 8", parallel, [gram(shapes, 8, schedule=schedule, backend=backend)]
    yield "MuonBP of 5, TP of 8", parallel, blockwise(shapes, Mesh(cols=8), 5, schedule=schedule, backend=backend)
