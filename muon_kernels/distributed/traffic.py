"""Costs of a step of several ranks, bytes and FLOPs, by formula: for any number of ranks, without any of them.

`owners` counts what exchange.py does, to the byte; the other functions count what other implementations do. Bytes sent
are those of a ring: where B bytes are gathered or scattered over N ranks, each sends B (N - 1) / N; where they are
summed, twice that. Gradients and parameters travel besides, whatever the optimizer: see `BESIDE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

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
        (m, n), replicas = self.plan.shape, len(self.owned) // len(self.shards)
        return matrices_in_round(max(self.owned), bytes_in_flight(self.plan.workspace_bytes, m * n, replicas), self.cap)

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
    """

    plan: Bucket
    elements: list[int]
    records: list[int]
    taken: list[int]

    @property
    def by_replica(self) -> list[int]:
        """Number of matrices of each replica; if there are several, they gather shares of as many as the largest."""
        shards = len(self.records)
        return [sum(self.taken[i : i + shards]) for i in range(0, len(self.taken), shards)]


class CopiedRound(NamedTuple):
    """Round of matrices of which every rank has copies.

    Attributes:
        works: the plan of one matrix and the number of matrices by owner, of each lot.
        share: bytes that every rank sends to each of the others.
    """

    works: list[tuple[Bucket, list[int]]]
    share: int


@lru_cache(maxsize=1024)
def _plan(m: int, n: int, schedule: Schedule, backend: str) -> Bucket:
    """Return the plan of one matrix."""
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
        plan = _plan(m, n, schedule, backend)
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


def _sliced(lots: Sequence[_Lot]) -> list[SlicedRound]:
    return [
        SlicedRound(lot.plan, [shard.elements for shard in lot.shards], lot.records, taken)
        for lot in lots
        for taken in lot.rounds
    ]


def _joined(lots: Sequence[_Lot]) -> list[CopiedRound]:
    """Return the rounds of copies, joined until a share is worth a collective."""
    ranks = len(lots[0].owned)
    found, waiting, enough = [], CopiedRound([], 0), share_bytes(max(lot.cap for lot in lots), ranks)
    own = [0] * ranks
    for lot in lots:
        for taken in lot.rounds:
            own = [before + n * lot.records[0] for before, n in zip(own, taken, strict=True)]
            waiting = CopiedRound([*waiting.works, (lot.plan, taken)], max(own))
            if waiting.share >= enough:
                found.append(waiting)
                waiting, own = CopiedRound([], 0), [0] * ranks
    return [*found, waiting] if waiting.share else found


def _copied(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where every rank has copies: each does its share and all gather the results."""
    shares, norms = [joined.share for joined in _joined(lots)], _norms(lots)
    workspace, flops = _multiplied(lots)
    held = torch.tensor([[lot.shards[0].elements * n for n in lot.owned] for lot in lots]).sum(0)
    sent = sum(shares) * (mesh.ranks - 1)
    buffers = min(IN_FLIGHT, len(shares)) * (max(shares) * (1 + mesh.ranks) + norms)
    return _by_rank(torch.tensor(sent), state_bytes * held, workspace, torch.tensor(buffers), flops, len(shares))


def _by_rank(
    sent: Tensor, state: Tensor, workspace: Tensor, buffers: Tensor, flops: Tensor, collectives: int
) -> list[Cost]:
    """Return the costs of every rank; `sent` and `buffers` may be one number for all."""
    columns = (each.expand_as(flops).tolist() for each in (sent, state, workspace, buffers, flops))
    return [
        Cost(sent_, state_, workspace_, buffers_, flops_, collectives)
        for sent_, state_, workspace_, buffers_, flops_ in zip(*columns, strict=True)
    ]


def _sharded(lots: Sequence[_Lot], mesh: Mesh, state_bytes: int) -> list[Cost]:
    """Return the costs where each rank sends its slices to owners and gets slices of the results back."""
    sent, slices, owned, state = (torch.zeros(mesh.ranks, dtype=torch.int64) for _ in range(4))
    sliced = _sliced(lots)
    for each in sliced:
        own, whole, share = torch.tensor(each.taken), sum(each.records), max(each.by_replica)
        here = torch.tensor(each.by_replica).repeat_interleave(mesh.shards)
        record = torch.tensor(each.records).repeat(mesh.replicas)
        sent += (here - own) * record + own * (whole - record) + (mesh.replicas - 1) * share * record
        slices = slices.maximum(share * record)
        owned = owned.maximum(own * whole).maximum((mesh.replicas > 1) * mesh.replicas * share * record)
    for lot in lots:
        held = torch.tensor([shard.elements for shard in lot.shards]).repeat(mesh.replicas)
        state += state_bytes * sum(lot.owned) * held
    buffers = min(IN_FLIGHT, len(sliced)) * (slices + owned + _norms(lots))
    workspace, flops = _multiplied(lots)
    collectives = len(sliced) * (2 + (mesh.replicas > 1))
    return _by_rank(sent, state, workspace, buffers, flops, collectives)


def flops(shapes: Shapes, *, schedule: Schedule | None = None, backend: str = "cuda") -> list[int]:
    """Return the FLOPs of every matrix."""
    plans = [(_plan(*sorted((m, n)), schedule or resolve(DEFAULT), backend), count) for m, n, count in shapes]
    return [plan.flops for plan, count in plans for _ in range(count)]


def plan_of(rows: int, cols: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Bucket:
    """Return the plan of one matrix's iteration."""
    return _plan(*sorted((rows, cols)), schedule or resolve(DEFAULT), backend)


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

    Every rank gathers every matrix's direction in bf16, orthogonalizes it, and keeps its slice of the result. See
    `sliced` for the cheaper reading, in which a rank gathers only the matrices that its slice has elements of.
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


def sliced(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> list[Cost]:
    """Return the costs of every rank of `ZeroMuon`: its slice of all parameters is one run of their elements.

    It gathers, in one collective, those matrices of which its slice has any element, and multiplies them; matrices at
    the borders of slices are multiplied by several ranks. `collectives` leaves out those that are `BESIDE`.

    Parameters are of bf16, so a rank keeps momentum and master copies in fp32. It holds what it gathers and, in fp32,
    all gradients.
    """
    schedule = schedule or resolve(DEFAULT)
    share = -(-elements(shapes) // ranks)
    sent, flops_, workspace, held = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks
    start = 0
    for rows, cols, count in shapes:
        plan, size = _plan(*sorted((rows, cols)), schedule, backend), rows * cols
        for _ in range(count):
            first, last = start // share, (start + size - 1) // share
            for rank in range(first, last + 1):
                own = min((rank + 1) * share, start + size) - max(rank * share, start)
                sent[rank] += 2 * own * (last - first)
                flops_[rank] += plan.flops
                workspace[rank] = max(workspace[rank], plan.workspace_bytes)
                held[rank] += 2 * size
            start += size
    whole = 4 * share * ranks
    return [Cost(sent[r], 8 * share, workspace[r], held[r] + whole, flops_[r], 1) for r in range(ranks)]


def padded(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost where every kind of matrix is exchanged at once, filled up with zeros to a multiple of the ranks.

    Each rank gets as many whole matrices, and as many rows of each. https://github.com/microsoft/dion does so under
    FSDP2 (01287d7, megabatch_base.py). What it holds are inputs and outputs of an exchange of one kind; three kinds may
    be under way.
    """
    schedule = schedule or resolve(DEFAULT)
    sent = state = flops = 0.0
    workspace = buffers = 0
    for rows, cols, count in shapes:
        each, slice_ = padding(rows, cols, count, ranks)
        plan = _plan(*sorted((rows, cols)), schedule, backend)
        sent += 2 * each * slice_ * (ranks - 1)
        state += 4 * count * rows * cols / ranks
        flops += each * plan.flops
        workspace, buffers = max(workspace, each * plan.workspace_bytes), max(buffers, 2 * each * slice_ * ranks)
    return Cost(sent, state, workspace, buffers, flops, 2 * len(shapes))


def padding(rows: int, cols: int, count: int, ranks: int) -> tuple[int, int]:
    """Return how many of such matrices each rank gets, zeros among them, and the bytes of a rank's rows of one."""
    return -(-count // ranks), 2 * -(-rows // ranks) * cols


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
