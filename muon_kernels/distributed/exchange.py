"""A step of matrices whose parts are on several ranks, or that several ranks have copies of.

Muon needs whole matrices. Each is dealt to an owner: ranks send it their slices of the directions, in the dtype that is
multiplied anyway, the owner orthogonalizes and sends slices back. Replicas take turns: each does its share and they
gather one another's results. What a rank sends is 2 bytes an element there and 2 back, whatever the number of ranks;
https://arxiv.org/abs/2502.16982 gathers every matrix on every rank instead.

Equal matrices that are cut in the same way make a lot. A lot goes through in rounds that fit the workspace; the slices
of the next round travel, and so do the results of the last, while one round is multiplied.

The norm of a matrix comes from its parts' in double, so that the result is that of one process: the same bits where
momentum and products are the same, which is so for every backend but "eager", whose slices are normalised before they
are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..stages import stages_of
from ..stages.second_moment import SecondMoment
from ..stages.stage import floats_for
from ..step.operands import Operand, check
from ..step.options import StepOptions
from ..step.plan import Bucket, Shared, plan_bucket, workspace_bytes
from ..step.prepare import prepare
from ..step.run import Local, check_uncaptured
from ..step.work import Scalars, Task, Work
from ..step.workspace import Workspace
from . import second_moment
from .balance import assign_owners
from .lots import Entry, Lot, LotKey, Momenta, holders
from .placement import Placement, Team
from .shards import layouts, shards_of
from .slices import (
    AHEAD,
    IN_FLIGHT,
    LATE,
    NORM_BYTES,
    Buffers,
    Rectangle,
    bytes_in_flight,
    matrices_in_round,
    share_bytes,
)
from .strategies import STRATEGIES, blocks
from .strategies.owner import OwnerRound
from .strategies.replicas import ReplicaRound


class Exchange:
    """The step of all matrices of a team; a `Task`.

    Attributes:
        team: the ranks.
        rounds: in order.
    """

    together = True

    def __init__(self, team: Team, rounds: Sequence[OwnerRound | ReplicaRound]) -> None:
        """Nothing is allocated yet."""
        self.team, self.rounds = team, list(rounds)
        self._buffers: list[Buffers] = []

    @property
    def works(self) -> list[Work]:
        """How this rank iterates what it owns."""
        return [lot.work for lot in self.lots]

    @property
    def buckets(self) -> list[Bucket]:
        """Those of them in which this rank owns any."""
        return [work.bucket for work in self.works if work.bucket.slots]

    @property
    def bytes_sent(self) -> int:
        """By this rank to others in a step."""
        return sum(r.bytes_sent for r in self.rounds)

    @property
    def collectives(self) -> int:
        """Calls in a step."""
        return sum(r.collectives for r in self.rounds)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Elements of a set of buffers: bytes, bytes, norms."""
        slices, owned = (max(column) for column in zip(*(r.buffer_bytes for r in self.rounds), strict=True))
        largest = max(max(map(len, lot.entries)) for lot in self.lots)
        return slices, owned, largest * self.team.shard_count

    @property
    def buffer_bytes(self) -> int:
        """What is allocated beside the workspace."""
        if not self.rounds:
            return 0
        slices, owned, norms = self._sizes
        return min(IN_FLIGHT, len(self.rounds)) * (slices + owned + NORM_BYTES * norms)

    @property
    def state_bytes(self) -> int:
        """Of the momenta that this rank keeps."""
        kept = [matrix for r in self.rounds for bundle in r.momenta for matrix in bundle or ()]
        return sum(at.batch * at.rows * at.cols * t.itemsize for t, at in kept)

    @property
    def exchanged(self) -> Shared:
        """What a plan has of it."""
        entries = [(lot, of_rank) for lot in self.lots for of_rank in lot.entries]
        return Shared(
            ranks=self.team.ranks,
            matrices=sum(len(of_rank) for _, of_rank in entries),
            owned=sum(len(lot.entries[self.team.rank]) for lot in self.lots),
            elements=sum(len(of_rank) * math.prod(lot.key.shape) for lot, of_rank in entries),
            bytes_sent=self.bytes_sent,
            collectives=self.collectives,
            state_bytes=self.state_bytes,
            buffer_bytes=self.buffer_bytes,
        )

    def reserve(self, workspace: Workspace) -> None:
        """Allocate buffers, and room in the workspace for `works`."""
        self._allocate()
        for work in self.works:
            workspace.reserve(work.device, work.bucket.workspace_bytes)

    def _allocate(self) -> None:
        if self._buffers or not self.rounds:
            return
        device = self.works[0].device
        *sizes, count = self._sizes
        for _ in range(min(IN_FLIGHT, len(self.rounds))):
            # doubles, for what is viewed as such
            slices, owned = (
                torch.empty(-(-size // NORM_BYTES), dtype=torch.float64, device=device).view(torch.uint8)
                for size in sizes
            )
            self._buffers.append(Buffers(slices, owned, torch.empty(count, dtype=torch.float64, device=device)))

    @property
    def lots(self) -> list[Lot]:
        """What goes through, each once."""
        lots = [lot for r in self.rounds for lot in ([r.lot] if isinstance(r, OwnerRound) else [c.lot for c in r.lots])]
        return list({id(lot): lot for lot in lots}.values())

    def warm_up(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """See `Task`."""
        check_uncaptured(self.works, scalars)

    def run(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """See `Task`.

        Raises:
            Failed: a collective did not end; some matrices may be stepped and others not.
        """
        rounds, buffers = self.rounds, self._buffers
        for i in range(-AHEAD, len(rounds) + LATE):
            if 0 <= i + AHEAD < len(rounds):
                rounds[i + AHEAD].begin(grads, scalars, buffers[(i + AHEAD) % IN_FLIGHT])
            if 0 <= i < len(rounds):
                rounds[i].iterate(scalars, workspace, buffers[i % IN_FLIGHT])
            if i >= LATE:
                rounds[i - LATE].end(scalars, buffers[(i - LATE) % IN_FLIGHT])


def divide(
    operands: Sequence[Operand],
    placements: Sequence[Placement | None] | None,
    options: StepOptions,
    *,
    strategy: str,
    steps_shards: bool = False,
    shard_lr_factor: float = 1.0,
) -> list[Task]:
    """Divide a step into what this rank does alone and what ranks do together; nothing is written.

    Args:
        operands: of DTensors this rank's parts, without state that another rank keeps.
        placements: where each is; None for those, or if all, that this rank steps alone.
        options: the group's.
        strategy: see `Muon`.
        steps_shards: whether parts of matrices that are cut are stepped as matrices, see strategies/blocks.py.
        shard_lr_factor: of their learning rate.

    Raises:
        ValueError, TypeError, RuntimeError: what cannot be stepped.
    """
    if placements is None or not any(placements):
        return [Local(prepare(operands, options))]
    check(operands, options)
    alone: dict[int, Operand] = {}
    together: list[Placement | None] = []
    for index, (operand, placement) in enumerate(zip(operands, placements, strict=True)):
        together.append(None)
        if placement is None:
            alone[index] = operand
        elif options.power == 1:
            found = shards_of(placement, options.flatten, operand.split)
            alone[index] = operand._replace(pieces=[(piece, shape) for piece, shape, _ in found])
        elif steps_shards and placement.team.shards is not None:
            own = list(blocks.shard_shapes(placement, options.flatten, operand.split))
            alone[index] = operand._replace(pieces=own, lr_factor=shard_lr_factor)
        else:
            together[-1] = placement
    exchanges = exchanges_of(operands, together, options, STRATEGIES[strategy]) if any(together) else []
    return [Local(prepare(list(alone.values()), options), list(alone)), *exchanges]


def exchanges_of(
    operands: Sequence[Operand],
    placements: Sequence[Placement | None],
    options: StepOptions,
    strategy: type[OwnerRound] = OwnerRound,
) -> list[Exchange]:
    """How the operands that have a placement are stepped, a team at a time; nothing is written.

    Args:
        operands: this rank's parts.
        placements: where they are; None for those that are stepped alone.
        options: the group's.
        strategy: of the rounds of what is cut, where it can.

    Raises:
        ValueError, TypeError, RuntimeError: what cannot be stepped.
    """
    by_key: dict[LotKey, list[tuple[int | None, Entry]]] = {}
    for index, (operand, placement) in enumerate(zip(operands, placements, strict=True)):
        if placement is not None:
            for key, owned in _entries(index, operand, placement, options, strategy):
                by_key.setdefault(key, []).extend(owned)
    params = [operand.param for operand in operands]
    momenta = [operand.momentum for operand in operands] if options.momentum else None
    exchanges = []
    for team in dict.fromkeys(key.team for key in by_key):
        of_team = {key: found for key, found in by_key.items() if key.team is team and found and min(key.shape)}
        lots = _assigned(team, of_team, options, strategy)
        cap = max((_cap(lot.work.bucket.backend, options.max_workspace_bytes) for lot in lots), default=0)
        rounds = _owner_rounds if team.shards else partial(_replica_rounds, share=share_bytes(cap, team.ranks))
        exchanges.append(Exchange(team, rounds(lots, params, momenta)))
    return exchanges


def _entries(
    index: int, operand: Operand, placement: Placement, options: StepOptions, strategy: type[OwnerRound]
) -> Iterator[tuple[LotKey, list[tuple[int | None, Entry]]]]:
    """The matrices of an operand, kind by kind, each with the rank that keeps its momentum, if one does."""
    p, g, V, flatten = operand.param, operand.grad, operand.second_moment, options.flatten
    for piece, (batch, rows, cols), rectangles in shards_of(placement, flatten, operand.split):
        tall = rows > cols or (rows == cols and strategy.turns(rectangles))
        if tall:
            rectangles = tuple(Rectangle(left, top, c, r) for top, left, r, c in rectangles)
        key = LotKey(placement.team, (min(rows, cols), max(rows, cols)), rectangles, p.device, g.dtype, p.dtype)
        here = rectangles[placement.team.shard].elements > 0
        ats = [
            layouts(t, flatten, piece, batch, tall) if t is not None and here else [None] * batch
            for t in (p, operand.momentum, g)
        ]
        form = options.second_moment
        views = [None] * batch if form is None or V is None or not here else second_moment.views(form, V, flatten)
        ratio = operand.lr_ratio(options, rows, cols)
        yield (
            key,
            [
                (placement.owner, Entry(index, of_p, of_buffer, of_g, ratio, tall, view))
                for of_p, of_buffer, of_g, view in zip(*ats, views, strict=True)
            ],
        )


class _Choice(NamedTuple):
    """How a kind of matrices goes through: the way of its rounds, its plan by their number, and notes."""

    strategy: type[OwnerRound]
    plan: Callable[[int], Bucket]
    notes: tuple[str, ...]


def _chosen(key: LotKey, options: StepOptions, strategy: type[OwnerRound]) -> _Choice:
    name, notes = backends.choose(
        options.backend, key.device, (key.grad_dtype, key.param_dtype), options.workspace_dtype, key.shape
    )
    reason = strategy.refuses(key)
    strategy = OwnerRound if reason else strategy
    if reason and len(holders(key)) > 1:
        notes += (reason,)
    # Second moments of parts are not in the stack, see lots.py.
    stages = [stage for stage in stages_of(options) if not isinstance(stage, SecondMoment)]
    plan = partial(
        plan_bucket,
        strategy.shapes(key)[0],
        schedule=options.schedule,
        ns_algorithm=strategy.algorithm(options.ns_algorithm, name),
        backend=name,
        max_workspace_bytes=options.max_workspace_bytes,
        workspace_dtype=options.workspace_dtype,
        bytes_per_element=key.grad_dtype.itemsize + 4 * key.param_dtype.itemsize,
        stepped=False,
        stages=stages,
        stage_bytes=4 * floats_for(stages, *key.shape, key.device),
    )
    return _Choice(strategy, plan, notes)


def _assigned(
    team: Team,
    by_key: Mapping[LotKey, Sequence[tuple[int | None, Entry]]],
    options: StepOptions,
    strategy: type[OwnerRound],
) -> list[Lot]:
    """A lot of every kind, whose matrices are dealt to owners by their FLOPs."""
    chosen = {key: _chosen(key, options, strategy) for key in by_key}
    costs, among = [], []
    for key, entries in by_key.items():
        cost, held = chosen[key].plan(1).flops, holders(key)
        nearby = [r * team.shard_count + h for r in range(team.replica_count) for h in held]
        anywhere = chosen[key].strategy.owners(team)
        for owner, _ in entries:
            costs.append(cost)
            # What only one rank has a part of stays there.
            among.append([owner] if owner is not None else nearby if len(held) == 1 else anywhere)
    owners = iter(assign_owners(costs, team.ranks, among=among))
    lots: list[Lot] = []
    group_index = 0
    for key, entries in by_key.items():
        by_owner: list[list[Entry]] = [[] for _ in range(team.ranks)]
        for _, entry in entries:
            by_owner[next(owners)].append(entry)
        lots.append(_lot(key, by_owner, group_index, options, chosen[key], owner_keeps_state=entries[0][0] is not None))
        group_index += len(entries)
    return lots


def _cap(backend: str, max_workspace_bytes: int | None) -> int:
    return backends.get(backend).default_workspace_bytes() if max_workspace_bytes is None else max_workspace_bytes


def _lot(
    key: LotKey,
    entries: list[list[Entry]],
    group_index: int,
    options: StepOptions,
    choice: _Choice,
    owner_keeps_state: bool,
) -> Lot:
    strategy, plan, notes = choice
    owned, largest = len(entries[strategy.owner_here(key.team)]), max(map(len, entries))
    bucket = plan(owned)
    held, (m, n) = strategy.shapes(key)
    schedule, stages = options.schedule, stages_of(options)
    in_stack = [stage for stage in stages if owner_keeps_state or not isinstance(stage, SecondMoment)]

    def each(m: int, n: int) -> int:
        scratch = 4 * floats_for(in_stack, m, n, key.device)
        return workspace_bytes(bucket.backend, bucket.algorithm, m, n, schedule) + scratch

    cap = _cap(bucket.backend, options.max_workspace_bytes)
    round_size = matrices_in_round(largest, bytes_in_flight(each(m, n), m * n, key.team.replica_count), cap)
    chunks = tuple(min(round_size, owned - start) for start in range(0, owned, round_size))
    # Momenta of copies that no rank alone keeps are updated in the workspace, on every rank those of all.
    slots = round_size if key.team.shards is None and not owner_keeps_state else max(chunks, default=0)
    bucket = strategy.counted(
        replace(bucket, chunks=chunks, slots=slots, workspace_bytes=slots * each(*held)), schedule
    )
    stage_floats = floats_for(in_stack, *held, key.device)
    own = Work(bucket, notes, schedule, key.device, [], stages, stage_floats=stage_floats)
    return Lot(key, own, group_index, entries, round_size, strategy, owner_keeps_state)


def _owner_rounds(lots: Sequence[Lot], params: Sequence[Tensor], momenta: Momenta) -> list[OwnerRound]:
    """Those first in which most ranks have something to do."""
    rounds = [lot.strategy(lot, i * lot.round_size, params, momenta) for lot in lots for i in range(lot.rounds)]
    return sorted(rounds, key=lambda r: -sum(len(entries) > r.start for entries in r.lot.entries))


def _replica_rounds(lots: Sequence[Lot], params: Sequence[Tensor], momenta: Momenta, share: int) -> list[ReplicaRound]:
    """Lots together until a share of their results has so many bytes, which is worth a collective."""
    rounds, waiting = [], []
    for lot in lots:
        for i in range(lot.rounds):
            waiting.append((lot, i * lot.round_size))
            copies = ReplicaRound(waiting, params, momenta)
            if copies.share >= share:
                rounds.append(copies)
                waiting = []
    if waiting:
        rounds.append(ReplicaRound(waiting, params, momenta))
    return rounds
