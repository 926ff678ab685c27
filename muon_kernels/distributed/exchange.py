"""A step that several ranks take together: of matrices whose shards they hold, or of which they have copies.

Muon needs whole matrices. Each is assigned to an owner. Ranks send it their slices of the direction, in the dtype that
is multiplied anyway; the owner orthogonalizes the matrix and sends slices of the result back. Replicas take turns: each
does its share and they gather one another's results. A rank sends 2 bytes an element to owners and 2 back, whatever the
number of ranks; https://arxiv.org/abs/2502.16982 gathers every matrix on every rank instead.

Equal matrices that are sharded in the same way make a lot. A lot is stepped in rounds that fit the workspace. While one
round is multiplied, slices of the next rounds travel, and so do results of the last ones.

The norm of a matrix is computed from the norms of its shards in double precision. So the result is that of one process,
to the bit, where momentum and products are the same. This holds for every backend but "eager", which normalises slices
before it rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..layout import Bundle
from ..stages.packed import Packed, Quantized
from ..stages.second_moment import SecondMoment
from ..stages.stage import floats_for
from ..step.operands import Operand, check
from ..step.options import StepOptions
from ..step.plan import Bucket, Shared, plan_bucket, workspace_bytes
from ..step.prepare import prepare
from ..step.run import Local, check_uncaptured
from ..step.work import Scalars, Task, Work
from ..step.workspace import Workspace
from .balance import deal
from .gathers import GATHERS, Gathers, part_bytes
from .lots import Entry, Kept, Lot, LotKey, holders, matrices_of
from .placement import Placement, Team
from .shards import shards_of
from .slices import (
    AHEAD,
    IN_FLIGHT,
    LATE,
    NORM_BYTES,
    Buffers,
    bytes_in_flight,
    matrices_in_round,
    share_bytes,
)
from .strategies import STRATEGIES, blocks
from .strategies.owner import OwnerRound
from .strategies.replicas import ReplicaRound


class Exchange:
    """Step of all matrices of a team: a `Task`.

    Attributes:
        team: the ranks.
        rounds: in the order in which they begin.
    """

    together = True

    def __init__(self, team: Team, rounds: Sequence[OwnerRound | ReplicaRound]) -> None:
        """Take the rounds of a team; allocate nothing yet."""
        self.team, self.rounds = team, list(rounds)
        self._buffers: list[Buffers] = []
        self._gathers: Gathers | None = None

    @cached_property
    def works(self) -> list[Work]:
        """The iteration on this rank of every lot."""
        return [lot.work for lot in self.lots]

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets in which this rank owns a matrix."""
        return [work.bucket for work in self.works if work.bucket.slots]

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in a step."""
        return sum(r.bytes_sent for r in self.rounds)

    @property
    def collectives(self) -> int:
        """Number of collectives in a step."""
        return sum(r.collectives for r in self.rounds)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Sizes of a set of buffers: bytes of slices, bytes of owned matrices, number of norms."""
        slices, owned = (max(column) for column in zip(*(r.buffer_bytes for r in self.rounds), strict=True))
        largest = max(max(map(len, lot.entries)) for lot in self.lots)
        return slices, owned, largest * self.team.shard_count

    @property
    def buffer_bytes(self) -> int:
        """Bytes that are allocated beside the workspace."""
        if not self.rounds:
            return 0
        slices, owned, norms = self._sizes
        own = min(IN_FLIGHT, len(self.rounds)) * (slices + owned + NORM_BYTES * norms)
        return own + math.prod(self._gathered) + 4 * self._numbers

    @property
    def _gathered(self) -> tuple[int, int]:
        """Number of parts that replicas gather at a time, and the bytes of the largest."""
        sizes = [sum(part.sizes) for r in self.rounds for part in r.parts]
        return min(GATHERS, len(sizes)), max(sizes, default=0)

    @property
    def _numbers(self) -> int:
        """Fp32 numbers of memory for what is done to shards: of one round, as no two do it at a time."""
        return max((r.numbers for r in self.rounds), default=0)

    @property
    def state_bytes(self) -> int:
        """Bytes of the momenta that this rank keeps."""
        return sum(_bytes_of(momenta) for r in self.rounds for momenta in r.momenta if momenta)

    @property
    def exchanged(self) -> Shared:
        """The line of a plan about this exchange."""
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

    def facts(self, team: object) -> list[tuple[str, str]]:
        """Return what ranks would exchange and in which order, if it is with this team; see `Task.facts`."""
        return self._facts if team is self.team else []

    @cached_property
    def _facts(self) -> list[tuple[str, str]]:
        """Decisions that all ranks of the team have to have made alike; rounds do not change, so neither do these."""
        places, facts = {id(lot): i for i, lot in enumerate(self.lots)}, []
        # Counted among the team's: how many others a rank steps beside them is its own affair.
        params = {entry.param for lot in self.lots for entries in lot.entries for entry in entries}
        number = {param: i for i, param in enumerate(sorted(params))}
        for i, lot in enumerate(self.lots):
            bucket, owners = lot.work.bucket, [[number[entry.param] for entry in entries] for entries in lot.entries]
            how = f"by {bucket.backend!r} in {bucket.workspace_dtype}, {lot.round_size} of an owner at a time"
            facts += [(f"the step of {lot}, lot {i}", how), (f"the division among owners of lot {i}", repr(owners))]
            facts.append((f"the strategy of lot {i}", lot.strategy.__name__))
            numbers = [[entry.number for entry in entries] for entries in lot.entries]
            facts.append((f"the numbers of lot {i}'s matrices in their param groups", repr(numbers)))
        order = [[(places[id(lot)], start) for lot, start in r.begun] for r in self.rounds]
        return [*facts, ("the order of rounds", repr(order))]

    def reserve(self, workspace: Workspace) -> None:
        """Allocate the buffers, and room in the workspace for `works`."""
        self._allocate()
        for work in self.works:
            workspace.reserve(work.device, work.bucket.workspace_bytes)

    def _allocate(self) -> None:
        if self._buffers or not self.rounds:
            return
        device = self.works[0].device
        *sizes, count = self._sizes
        numbers = torch.empty(self._numbers, dtype=torch.float32, device=device)

        def take(size: int) -> Tensor:
            # Allocated as doubles, for alignment: norms are viewed as such.
            return torch.empty(-(-size // NORM_BYTES), dtype=torch.float64, device=device).view(torch.uint8)

        parts, size = self._gathered
        gathers = self._gathers = Gathers(self.team, [take(size) for _ in range(parts)])
        for _ in range(min(IN_FLIGHT, len(self.rounds))):
            slices, owned = map(take, sizes)
            norms = torch.empty(count, dtype=torch.float64, device=device)
            self._buffers.append(Buffers(slices, owned, norms, numbers, gathers))

    @cached_property
    def lots(self) -> list[Lot]:
        """The lots that the rounds step, each once."""
        lots = [lot for r in self.rounds for lot, _ in r.begun]
        return list({id(lot): lot for lot in lots}.values())

    def warm_up(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Take the scratch memory of packing; raise RuntimeError where a CUDA graph would capture random bits."""
        check_uncaptured(self.works, scalars)
        for packed in (packed for r in self.rounds for packed in r.kept_packed if packed):
            packed[0].reserve()

    def run(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Step all matrices of the team, several rounds at a time; see `Task.run`.

        Raises:
            Failed: a collective did not complete; some matrices may be stepped and others not.
        """
        rounds, buffers = self.rounds, self._buffers
        if self._gathers is not None:
            self._gathers.clear()
        for i in range(-AHEAD, len(rounds) + LATE):
            if 0 <= i + AHEAD < len(rounds):
                rounds[i + AHEAD].begin(grads, scalars, buffers[(i + AHEAD) % IN_FLIGHT])
            if 0 <= i < len(rounds):
                rounds[i].iterate(scalars, workspace, buffers[i % IN_FLIGHT])
            if i >= LATE:
                rounds[i - LATE].end(scalars, buffers[(i - LATE) % IN_FLIGHT])


def _bytes_of(momenta: Bundle | Packed) -> int:
    if isinstance(momenta, Packed):
        return sum(part.stored.nbytes + part.absmax.nbytes for part in momenta if isinstance(part, Quantized))
    return sum(at.batch * at.rows * at.cols * t.itemsize for t, at in momenta)


def divide(
    operands: Sequence[Operand],
    placements: Sequence[Placement | None] | None,
    options: StepOptions,
    *,
    strategy: str,
    steps_shards: bool = False,
    shard_lr_factor: float = 1.0,
) -> list[Task]:
    """Divide a step into what this rank does alone and what ranks do together; write nothing.

    Args:
        operands: of DTensors, this rank's shards, without state that another rank keeps.
        placements: where each operand is, None for one that this rank steps alone; or None if it steps all alone.
        options: the group's.
        strategy: see `Muon`.
        steps_shards: whether this rank steps its shards as if they were whole matrices, see strategies/blocks.py.
        shard_lr_factor: factor of the learning rate of such shards.

    Raises:
        ValueError, TypeError, RuntimeError: an operand or an option that cannot be used.
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
            alone[index] = operand._replace(pieces=[(piece, shape) for piece, shape, *_ in found])
        elif steps_shards and placement.team.shards is not None:
            own, windows, before = blocks.shard_shapes(placement, options.flatten, operand.split)
            at = windows if options.stochastic_rounding else None
            alone[index] = operand._replace(pieces=own, lr_factor=shard_lr_factor, first_part=before, windows=at)
        else:
            together[-1] = placement
    exchanges = exchanges_of(operands, together, options, STRATEGIES[strategy]) if any(together) else []
    return [*([Local(prepare(list(alone.values()), options), list(alone))] if alone else []), *exchanges]


def exchanges_of(
    operands: Sequence[Operand],
    placements: Sequence[Placement | None],
    options: StepOptions,
    strategy: type[OwnerRound] = OwnerRound,
) -> list[Exchange]:
    """Return the exchanges that step the operands which have a placement, one for each team; write nothing.

    Args:
        operands: this rank's shards.
        placements: where the operands are; None for one that is stepped alone.
        options: the group's.
        strategy: the class of the rounds of sharded matrices, where it can step them.

    Raises:
        ValueError, TypeError, RuntimeError: an operand or an option that cannot be used.
    """
    by_key: dict[LotKey, list[tuple[int | None, Entry]]] = {}
    for index, (operand, placement) in enumerate(zip(operands, placements, strict=True)):
        if placement is not None:
            for key, owned in matrices_of(index, operand, placement, options, strategy):
                by_key.setdefault(key, []).extend(owned)
    kept = Kept(
        [operand.param for operand in operands],
        [operand.momentum for operand in operands] if options.momentum else None,
        [operand.mantissa for operand in operands] if options.master_weights else None,
    )
    exchanges = []
    for team in dict.fromkeys(key.team for key in by_key):
        of_team = {key: found for key, found in by_key.items() if key.team is team and found and min(key.shape)}
        lots = _assigned(team, of_team, options, strategy)
        cap = max((_cap(lot.work.bucket.backend, options.max_workspace_bytes) for lot in lots), default=0)
        rounds = _owner_rounds if team.shards else partial(_replica_rounds, share=share_bytes(cap, team.ranks))
        exchanges.append(Exchange(team, rounds(lots, kept)))
    return exchanges


class _Choice(NamedTuple):
    """Choice for all matrices of a key: the class of their rounds, their plan by shape and number, and notes."""

    strategy: type[OwnerRound]
    plan: Callable[[tuple[int, int], int], Bucket]
    notes: tuple[str, ...]


def _chosen(key: LotKey, options: StepOptions, strategy: type[OwnerRound]) -> _Choice:
    param_dtype = torch.float32 if options.master_weights else key.param_dtype
    dtypes = key.grad_dtype, key.momentum_dtype, param_dtype
    name, notes = backends.choose(options.backend, key.device, dtypes, options.workspace_dtype, key.shape)
    reason = strategy.refuses(key)
    strategy = OwnerRound if reason else strategy
    if reason and len(holders(key)) > 1:
        notes += (reason,)
    # What is done to shards is done outside of the stack, see `lots.normalized` and `lots.in_memory`.
    stages = tuple(s for s in options.stages if not (isinstance(s, SecondMoment) or s.packed))
    plan = partial(
        plan_bucket,
        options=options._replace(stages=stages, ns_algorithm=strategy.algorithm(options.ns_algorithm, name)),
        backend=name,
        bytes_per_element=key.grad_dtype.itemsize + 4 * key.param_dtype.itemsize,
        stepped=False,
        stage_bytes=4 * floats_for(stages, *key.shape, key.device),
    )
    return _Choice(strategy, plan, notes)


def _assigned(
    team: Team,
    by_key: Mapping[LotKey, Sequence[tuple[int | None, Entry]]],
    options: StepOptions,
    strategy: type[OwnerRound],
) -> list[Lot]:
    """Return a lot for every key, its matrices assigned to owners by their FLOPs."""
    chosen = {key: _chosen(key, options, strategy) for key in by_key}
    costs, among = [], []
    for key, entries in by_key.items():
        of_key, plan, _ = chosen[key]
        # Of the widest shard, which all ranks know: they have to come to the same owners.
        cost, held = plan(of_key.shapes(key)[1], 1).flops, holders(key)
        nearby = [r * team.shard_count + h for r in range(team.replica_count) for h in held]
        anywhere = of_key.owners(team)
        for owner, _ in entries:
            costs.append(cost)
            # A matrix of which only one rank holds elements stays there.
            among.append([owner] if owner is not None else nearby if len(held) == 1 else anywhere)
    owners = iter(deal(costs, team.shard_count, team.replica_count, among))
    lots: list[Lot] = []
    for key, entries in by_key.items():
        by_owner: list[list[Entry]] = [[] for _ in range(team.ranks)]
        for _, entry in entries:
            by_owner[next(owners)].append(entry)
        lots.append(_lot(key, by_owner, options, chosen[key], owner_keeps_state=entries[0][0] is not None))
    return lots


def _cap(backend: str, max_workspace_bytes: int | None) -> int:
    return backends.get(backend).default_workspace_bytes if max_workspace_bytes is None else max_workspace_bytes


def _lot(
    key: LotKey, entries: list[list[Entry]], options: StepOptions, choice: _Choice, owner_keeps_state: bool
) -> Lot:
    strategy, plan, notes = choice
    owned, largest = len(entries[strategy.owner_here(key.team)]), max(map(len, entries))
    held, (m, n) = strategy.shapes(key)
    bucket = plan(held, owned)
    schedule, stages = options.schedule, options.stages
    in_stack = [stage for stage in stages if owner_keeps_state or not isinstance(stage, SecondMoment)]

    def each(m: int, n: int) -> int:
        scratch = 4 * floats_for(in_stack, m, n, key.device)
        return workspace_bytes(bucket.backend, bucket.algorithm, m, n, schedule) + scratch

    cap = _cap(bucket.backend, options.max_workspace_bytes)
    round_size = matrices_in_round(largest, bytes_in_flight(each(m, n), m * n, key.team.shards is not None), cap)
    chunks = tuple(min(round_size, owned - start) for start in range(0, owned, round_size))
    # Where every rank keeps the momenta of all copies, it updates all of them, in the workspace.
    slots = round_size if key.team.shards is None and not owner_keeps_state else max(chunks, default=0)
    bucket = strategy.counted(
        replace(bucket, chunks=chunks, slots=slots, workspace_bytes=slots * each(*held)), schedule
    )
    stage_floats = floats_for(in_stack, *held, key.device)
    own = Work(bucket, notes, schedule, key.device, [], stages, stage_floats=stage_floats)
    return Lot(key, own, entries, round_size, strategy, owner_keeps_state, part_bytes(cap))


def _owner_rounds(lots: Sequence[Lot], kept: Kept) -> list[OwnerRound]:
    """Return the rounds of sharded lots; first those in which most ranks have a matrix to iterate."""
    rounds = [lot.strategy(lot, i * lot.round_size, kept) for lot in lots for i in range(lot.rounds)]
    return sorted(rounds, key=lambda r: -sum(len(entries) > r.start for entries in r.lot.entries))


def _replica_rounds(lots: Sequence[Lot], kept: Kept, share: int) -> list[ReplicaRound]:
    """Return the rounds of replicated lots, joined until a share of results has `share` bytes, worth a collective."""
    rounds, waiting = [], []
    for lot in lots:
        for i in range(lot.rounds):
            waiting.append((lot, i * lot.round_size))
            copies = ReplicaRound(waiting, kept)
            if copies.share >= share:
                rounds.append(copies)
                waiting = []
    if waiting:
        rounds.append(ReplicaRound(waiting, kept))
    return rounds
