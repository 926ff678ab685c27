"""Estimates of a step in the layouts that people train in, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..coefficients import Schedule
from ..distributed import alternatives, traffic
from ..distributed.traffic import BESIDE, CopiedRound, Cost, Mesh, Shapes, elements, largest
from ..step.plan import Bucket
from .estimate import Gpu, kernels_on
from .models import Model
from .network import NOTHING, Network
from .overlap import (
    ADAMW_BYTES,
    APPLY_BYTES,
    COPY_BYTES,
    FLAT_BYTES,
    UPDATE_BYTES,
    Stage,
    Step,
    Timeline,
    in_turn,
    overlapped,
)

HYBRID = EXPERTS = 64  # ranks that share a copy under hybrid sharding, and that share the experts of a layer
TENSOR = 8  # ranks of a tensor-parallel group, a node's
PERIOD = 5  # of MuonBP, in steps


# What each name stands for; "owners" are this package's.
LAYOUTS = {
    "AdamW, ZeRO-1": "elementwise on a slice of all parameters: its time is that of memory",
    "AdamW, FSDP2": "elementwise on shards, which takes as long",
    "gathered, ZeRO-1": "arXiv 2502.16982, algorithm 1, as written: every rank gathers and multiplies every matrix",
    "ZeroMuon, ZeRO-1": "the same algorithm where a rank gathers those matrices that its slice has elements of",
    "padded, FSDP2": "microsoft/dion 01287d7: matrices of a kind to all ranks at once, zeros where there are none",
    "owners, FSDP2": "Muon with shards of all ranks",
    f"owners, HSDP of {HYBRID}": f"Muon with shards of {HYBRID} ranks, and replicas that share the matrices",
    f"owners, EP of {EXPERTS}": f"{EXPERTS} ranks share the experts, each whole, or cut over every {EXPERTS}th rank",
    "owners, DDP": "Muon(process_group=...) of all ranks",
    f"sums of X Xᵀ, TP of {TENSOR}": f'strategy="gram" in a node, {TENSOR} ranks',
    f"MuonBP of {PERIOD}, TP of {TENSOR}": f'strategy="blocks" in a node, the mean over {PERIOD} steps',
}


class Row(NamedTuple):
    """Estimate of a layout.

    Attributes:
        beside: bytes that a rank sends besides, for gradients and parameters, whatever the optimizer.
        parameters: bytes of what a rank has of them between passes, in bf16.
        cost: the most that any rank has, field by field.
    """

    ranks: int
    name: str
    beside: float
    parameters: float
    cost: Cost
    timeline: Timeline

    @property
    def memory(self) -> float:
        """Return the least bytes that a rank needs: parameters, state and what a step holds; no gradients."""
        return self.parameters + self.cost.state + self.cost.workspace + self.cost.buffers


class Layouts:
    """Layouts of a model's matrices over ranks, and what a step costs in each."""

    def __init__(self, model: Model, ranks: int, gpu: Gpu, schedule: Schedule, network: Network) -> None:
        """Take what all layouts have in common; kernels are the first of `kernels_on`."""
        self.model, self.shapes, self.ranks = model, model.shapes, ranks
        self.step = Step(gpu, network, schedule)
        self.backend = kernels_on(gpu)[0].backend

    def rows(self) -> Iterator[Row]:
        """Yield the estimate of every layout that these ranks allow."""
        zero, ddp, fsdp = (self._ring(each * elements(self.shapes)) for each in BESIDE.values())
        adamw = [alternatives.adamw(self.shapes, self.ranks)], self._adamw()
        yield self._row("AdamW, ZeRO-1", zero, 1, *adamw)
        yield self._row("AdamW, FSDP2", fsdp, self.ranks, *adamw)
        yield self._row("gathered, ZeRO-1", zero, 1, *self._gathered())
        yield self._row("ZeroMuon, ZeRO-1", zero, 1, *self._sliced())
        yield self._row("padded, FSDP2", fsdp, self.ranks, *self._padded())
        yield self._row("owners, FSDP2", fsdp, self.ranks, *self.owners(self.shapes, Mesh(rows=self.ranks)))
        if self.ranks > HYBRID and self.ranks % HYBRID == 0:
            mesh = Mesh(rows=HYBRID, replicas=self.ranks // HYBRID)
            owners = self.owners(self.shapes, mesh)
            yield self._row(f"owners, HSDP of {HYBRID}", self._hybrid(mesh), HYBRID, *owners)
        if self.model.experts and self.ranks % EXPERTS == 0:
            beside, costs, timeline = self._expert_parallel()
            yield self._row(f"owners, EP of {EXPERTS}", beside, self.ranks, costs, timeline)
        yield self._row("owners, DDP", ddp, 1, *self.owners(self.shapes, Mesh(replicas=self.ranks)))
        parallel = self._hybrid(Mesh(cols=TENSOR, replicas=self.ranks // TENSOR)) - self._of(TENSOR, BESIDE["FSDP2"])
        yield self._row(f"sums of X Xᵀ, TP of {TENSOR}", parallel, TENSOR, *self._sums())
        yield self._row(f"MuonBP of {PERIOD}, TP of {TENSOR}", parallel, TENSOR, *self._blockwise())

    def _row(self, name: str, beside: float, shards: int, costs: list[Cost], timeline: Timeline) -> Row:
        return Row(self.ranks, name, beside, 2 * elements(self.shapes) / shards, largest(costs), timeline)

    def _ring(self, bytes_: float) -> float:
        return bytes_ * (self.ranks - 1) / self.ranks

    def _of(self, shards: int, each: float) -> float:
        """Return what a rank sends of `each` bytes an element that are gathered or scattered over the shards."""
        return each * elements(self.shapes) * (shards - 1) / shards

    def _hybrid(self, mesh: Mesh) -> float:
        """Return the bytes of FSDP2 over shards, whose gradients are summed over replicas in fp32."""
        summed = 2 * 4 * elements(self.shapes) / mesh.shards * (mesh.replicas - 1) / mesh.replicas
        return self._of(mesh.shards, BESIDE["FSDP2"]) + summed

    def _adamw(self) -> Timeline:
        """Return the time of AdamW, which is that of its memory, the same for a slice of a buffer and for shards."""
        seconds = self.step.passing(ADAMW_BYTES * elements(self.shapes) / self.ranks)
        return Timeline(seconds, 0.0, seconds, NOTHING)

    def _own_passes(self) -> float:
        """Return the seconds in which a rank updates momenta and parameters of an equal share of all elements."""
        return self.step.passing((UPDATE_BYTES + APPLY_BYTES) * elements(self.shapes) / self.ranks)

    def _gathered(self) -> tuple[list[Cost], Timeline]:
        group = self.step.network.group(self.ranks)
        parts = []
        for rows, cols, count in self.shapes:
            seconds = self.step.iteration(self.plan(rows, cols), 1)
            parts.append((count, self.step.network.gather(2 * rows * cols, group), seconds))
        cost = alternatives.gathered(self.shapes, self.ranks, schedule=self.step.schedule, backend=self.backend)
        return [cost], self._with_passes(in_turn(parts), self._own_passes())

    def plan(self, rows: int, cols: int) -> Bucket:
        """Return the plan of one matrix."""
        return traffic.plan_of(rows, cols, schedule=self.step.schedule, backend=self.backend)

    @staticmethod
    def _with_passes(timeline: Timeline, seconds: float) -> Timeline:
        """Return a timeline before and after which a rank passes over its memory so long."""
        return timeline._replace(seconds=timeline.seconds + seconds, computing=timeline.computing + seconds)

    def _sliced(self) -> tuple[list[Cost], Timeline]:
        """Return what `ZeroMuon` costs: one exchange, of neighbours in other nodes at worst, then all is multiplied."""
        costs = alternatives.sliced(self.shapes, self.ranks, schedule=self.step.schedule, backend=self.backend)
        share = -(-elements(self.shapes) // self.ranks)
        far = self.ranks > self.step.network.node
        most = max(max(cost.sent, cost.buffers - 4 * share * self.ranks - 2 * share) for cost in costs)
        spread = min(self.ranks - 1, 2 * -(-max(rows * cols for rows, cols, _ in self.shapes) // share))
        exchange = self.step.network.all_to_all(*((0, most, spread) if far else (most, 0, 0)))
        each = max(self._of_slices())
        return costs, self._with_passes(
            Timeline(exchange.both + each, each, each, exchange),
            self._own_passes() + self.step.passing(FLAT_BYTES * elements(self.shapes)),
        )

    def _of_slices(self) -> list[float]:
        """Return the seconds that each rank of `ZeroMuon` multiplies, matrices of a kind at a time."""
        share, start = -(-elements(self.shapes) // self.ranks), 0
        seconds = [0.0] * self.ranks
        for rows, cols, count in self.shapes:
            size, stop = rows * cols, start + rows * cols * count
            for rank in range(start // share, (stop - 1) // share + 1):
                begin, end = max(rank * share, start), min((rank + 1) * share, stop)
                touched = -(-(end - start) // size) - (begin - start) // size
                seconds[rank] += self.step.iteration(self.plan(rows, cols), touched)
            start = stop
        return seconds

    def _padded(self) -> tuple[list[Cost], Timeline]:
        """Return what Microsoft's dion costs under FSDP2; its kinds overlap as rounds here do."""
        network, group = self.step.network, self.step.network.group(self.ranks)
        stages = []
        for rows, cols, count in self.shapes:
            each, slice_ = alternatives.padding(rows, cols, count, self.ranks)
            others, far = each * slice_ * (group.near - 1), self.ranks - group.near
            exchange = network.all_to_all(others, each * slice_ * far, far)
            passed = count * rows * cols / self.ranks
            seconds = self.step.iteration(self.plan(rows, cols), each)
            seconds += self.step.passing(COPY_BYTES * each * rows * cols)
            update, iterate, apply = (
                torch.tensor([x], dtype=torch.float64)
                for x in (self.step.passing(UPDATE_BYTES * passed), seconds, self.step.passing(APPLY_BYTES * passed))
            )
            stages.append(Stage(update, exchange, iterate, exchange, NOTHING, apply))
        cost = alternatives.padded(self.shapes, self.ranks, schedule=self.step.schedule, backend=self.backend)
        return [cost], overlapped(stages)

    def owners(self, shapes: Shapes, mesh: Mesh, stride: int = 1) -> tuple[list[Cost], Timeline]:
        """Return what this package costs on a mesh of every `stride`-th rank; shards of a replica come first."""
        network = self.step.network
        shards, replicas = network.group(mesh.shards, stride), network.group(mesh.replicas, mesh.shards * stride)
        schedule, backend = self.step.schedule, self.backend
        known: dict[tuple[object, ...], Stage] = {}  # rounds of many matrices are alike
        stages = []
        for each in traffic.rounds(shapes, mesh, schedule=schedule, backend=backend):
            if isinstance(each, CopiedRound):
                stages.append(self.step.copied(each, replicas))
                continue
            key = each.plan, tuple(each.records), tuple(each.taken)
            if key not in known:
                known[key] = self.step.sliced(each, shards, replicas)
            stages.append(known[key])
        return traffic.owners(shapes, mesh, schedule=schedule, backend=backend), overlapped(stages)

    def _expert_parallel(self) -> tuple[float, list[Cost], Timeline]:
        """Return (bytes beside, costs, timeline) where 64 ranks share the experts, and FSDP2 shards the rest.

        Copies of a group's experts are cut along their rows over every 64th rank. On 64 ranks nothing of them travels.
        """
        dense, time = self.owners(self.model.dense, Mesh(rows=self.ranks))
        own = [(rows, cols, count // EXPERTS) for rows, cols, count in self.model.experts]
        shards = self.ranks // EXPERTS
        of_experts, more = self.owners(own, Mesh(rows=shards), EXPERTS)
        both = [
            Cost(
                a.sent + b.sent,
                a.state + b.state,
                max(a.workspace, b.workspace),
                max(a.buffers, b.buffers),
                a.flops + b.flops,
                a.collectives + b.collectives,
            )
            for a, b in ((cost, of_experts[rank // EXPERTS]) for rank, cost in enumerate(dense))
        ]
        beside = BESIDE["FSDP2"] * (
            elements(self.model.dense) * (self.ranks - 1) / self.ranks + elements(own) * (shards - 1) / shards
        )
        return beside, both, more.after(time)

    def _sums(self) -> tuple[list[Cost], Timeline]:
        """Return what sums of Gram matrices cost; each is waited for, as the next product needs it."""
        network = self.step.network
        cost = alternatives.gram(self.shapes, TENSOR, schedule=self.step.schedule, backend=self.backend)
        exchange, iterating = NOTHING, 0.0
        for rows, cols, count in self.shapes:
            m, n = min(rows, cols), -(-max(rows, cols) // TENSOR)
            one = alternatives.gram([(rows, cols, 1)], TENSOR, schedule=self.step.schedule, backend=self.backend)
            summed = network.reduce(4 * m * m, network.group(TENSOR))
            exchange = exchange.plus(summed.times(count * one.collectives))
            iterating += count * self.step.iteration(self.plan(m, n), 1)
        timeline = Timeline(exchange.both + iterating, iterating, iterating, exchange)
        return [cost], self._with_passes(timeline, self._own_passes() * self.ranks / TENSOR)

    def _blockwise(self) -> tuple[list[Cost], Timeline]:
        """Return the mean over a period: one step of owners, and the others of each rank's own parts."""
        mesh = Mesh(cols=TENSOR)
        costs = alternatives.blockwise(self.shapes, mesh, PERIOD, schedule=self.step.schedule, backend=self.backend)
        _, whole = self.owners(self.shapes, mesh)
        alone = 0.0
        for rows, cols, count in self.shapes:
            part = mesh.rectangles(rows, cols)[0]
            alone += self.step.iteration(self.plan(part.rows, part.cols), count)
        passes = self._own_passes() * self.ranks / TENSOR
        blocks = Timeline(alone + passes, alone, alone + passes, NOTHING)
        return costs, whole.times(1 / PERIOD).after(blocks.times((PERIOD - 1) / PERIOD))
