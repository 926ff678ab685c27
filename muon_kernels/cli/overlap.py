"""Time of a step on many ranks whose rounds overlap: while one is multiplied, others travel.

A GPU computes in order, and its network carries collectives in order, one at a time. Rounds begin and end as
`distributed.exchange.Exchange.run` has them: slices are sent two rounds ahead, results are waited for two rounds late.
A collective begins when the last rank has come to it. What replicas gather of one another's results under hybrid
sharding is waited for at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..distributed.gathers import Run
from ..distributed.slices import AHEAD, LATE
from ..distributed.traffic import CopiedRound, SlicedRound
from ..step.plan import Bucket
from .estimate import Gpu, iteration_seconds, pass_seconds
from .network import NOTHING, Group, Network, Seconds, loads

# Bytes of memory that are moved for an element: fp32 gradient read, momentum read and written, bf16 direction written;
# bf16 result read, fp32 parameter read and written; and an owner's copies into its workspace and back.
UPDATE_BYTES, APPLY_BYTES, COPY_BYTES = 4 + 2 * 4 + 2, 2 + 2 * 4, 2 * (2 + 2)
# fp32 gradient read; parameter and two moments read and written.
ADAMW_BYTES = 4 + 3 * 2 * 4
# Of all elements under ZeRO-1: bf16 gradients copied to a flat fp32 buffer, and gathered bf16 parameters from one.
FLAT_BYTES = (2 + 4) + 2 * 2


class Stage(NamedTuple):
    """Times of a round.

    Attributes:
        update, iterate, apply: seconds of every rank, float64: until slices are sent, to orthogonalize, and to update
            parameters.
        out, back: of slices to owners, and of the results.
        gather: among replicas, which wait for it.
    """

    update: Tensor
    out: Seconds
    iterate: Tensor
    back: Seconds
    gather: Seconds
    apply: Tensor


class Timeline(NamedTuple):
    """Estimated time of a step.

    Attributes:
        seconds: until the last rank has done.
        iterating: seconds that the slowest rank multiplies.
        computing: seconds that the slowest rank multiplies and passes over its memory.
        exchange: seconds that collectives take, one after the other.
    """

    seconds: float
    iterating: float
    computing: float
    exchange: Seconds

    def after(self, other: Timeline) -> Timeline:
        """Return the timeline of both, one after the other; each has its own slowest rank."""
        return Timeline(
            self.seconds + other.seconds,
            self.iterating + other.iterating,
            self.computing + other.computing,
            self.exchange.plus(other.exchange),
        )

    def times(self, factor: float) -> Timeline:
        """Return the timeline with every time multiplied, for a mean."""
        return Timeline(
            self.seconds * factor, self.iterating * factor, self.computing * factor, self.exchange.times(factor)
        )


def overlapped(stages: Sequence[Stage]) -> Timeline:
    """Return the timeline of rounds."""
    clock = torch.zeros_like(stages[0].iterate)
    network, count = 0.0, len(stages)
    sent, returned = [0.0] * count, [0.0] * count
    for i in range(-AHEAD, count + LATE):
        if 0 <= i + AHEAD < count:
            clock = clock + stages[i + AHEAD].update
            sent[i + AHEAD] = network = _carried(network, clock, stages[i + AHEAD].out)
        if 0 <= i < count:
            clock = clock.clamp_min(sent[i]) + stages[i].iterate
            returned[i] = network = _carried(network, clock, stages[i].back)
        if i >= LATE:
            done = stages[i - LATE]
            clock = clock.clamp_min(returned[i - LATE])
            if done.gather.both:
                network = _carried(network, clock, done.gather)
                clock = clock.clamp_min(network)
            clock = clock + done.apply
    collectives = [s for stage in stages for s in (stage.out, stage.back, stage.gather)]
    iterating = torch.stack([stage.iterate for stage in stages]).sum(0)
    passes = torch.stack([stage.update + stage.apply for stage in stages]).sum(0)
    exchange = Seconds(sum(s.bytes for s in collectives), sum(s.latency for s in collectives))
    return Timeline(float(clock.max()), float(iterating.max()), float((iterating + passes).max()), exchange)


def _carried(network: float, clock: Tensor, takes: Seconds) -> float:
    """Return when a collective is over that begins when the network and all ranks are ready."""
    return max(network, float(clock.max())) + takes.both if takes.both else network


def in_turn(parts: Iterable[tuple[int, Seconds, float]]) -> Timeline:
    """Return the timeline of matrices that are gathered one after the other, each while the last one is multiplied.

    That is the larger of both for each matrix, and the smaller once, to fill or to drain; kinds that differ in which is
    the larger may take less.

    Args:
        parts: of each kind, how many there are, what gathering one takes, and the seconds to multiply it.
    """
    parts = list(parts)
    bytes_, latency, iterating = (
        sum(each) for each in zip(*((n * s.bytes, n * s.latency, n * t) for n, s, t in parts), strict=True)
    )
    seconds = sum(n * max(s.both, t) for n, s, t in parts) + min(parts[-1][1].both, parts[-1][2])
    return Timeline(seconds, iterating, iterating, Seconds(bytes_, latency))


class Step(NamedTuple):
    """Conditions of a step: the GPU, its network, and coefficients. Times of batches are kept."""

    gpu: Gpu
    network: Network
    schedule: Schedule

    def iteration(self, plan: Bucket, count: int) -> float:
        """Return the seconds in which a GPU orthogonalizes `count` matrices at a time."""
        return _iteration(plan, count, self.gpu, self.schedule) if count else 0.0

    def iterations(self, plan: Bucket, counts: Sequence[int]) -> Tensor:
        """Return the seconds for every count."""
        table = {count: self.iteration(plan, count) for count in set(counts)}
        return torch.tensor([table[count] for count in counts], dtype=torch.float64)

    def passing(self, bytes_: float) -> float:
        """Return the seconds in which a GPU moves so many bytes of its memory."""
        return pass_seconds(bytes_, self.gpu)

    def sliced(self, each: SlicedRound, shards: Group, replicas: Group) -> Stage:
        """Return the times of a round of matrices that are cut."""
        (m, n), size = each.plan.shape, len(each.records)
        segments = {tuple(each.taken[i : i + size]) for i in range(0, len(each.taken), size)}
        exchanged = max(
            (loads(each.records, list(own), shards.near).seconds(self.network) for own in segments),
            key=lambda s: s.both,
        )
        # Every replica keeps all momenta and parameters of its shard.
        held = torch.tensor(each.elements, dtype=torch.float64).repeat(replicas.ranks) * sum(each.taken)
        owned = torch.tensor(each.taken, dtype=torch.float64) * m * n
        largest = max(each.records)
        return Stage(
            update=held * self.passing(UPDATE_BYTES),
            out=exchanged,
            iterate=self.iterations(each.plan, each.taken) + owned * self.passing(COPY_BYTES),
            back=exchanged,
            gather=self.gathered(each.parts, [largest], replicas),
            apply=held * self.passing(APPLY_BYTES),
        )

    def gathered(self, parts: Sequence[Sequence[Run]], records: Sequence[int], replicas: Group) -> Seconds:
        """Return the time in which replicas gather parts of results, one after the other; `records` is by lot."""
        found = NOTHING
        for part in parts:
            shares = [0] * replicas.ranks
            for run in part:
                shares[run.replica] += run.matrices * records[run.lot]
            senders = sum(share > 0 for share in shares)
            equal = len({*shares}) == 1
            network, total = self.network, sum(shares)
            found = found.plus(
                network.gather(total, replicas) if equal else network.broadcast(total, senders, replicas)
            )
        return found

    def copied(self, each: CopiedRound, replicas: Group) -> Stage:
        """Return the times of a round of copies: each rank does its share, and all gather the results."""
        iterate, everything = torch.zeros(replicas.ranks, dtype=torch.float64), 0
        for plan, taken in each.works:
            owned = torch.tensor(taken, dtype=torch.float64) * plan.shape[0] * plan.shape[1]
            iterate += self.iterations(plan, taken) + owned * self.passing(UPDATE_BYTES + COPY_BYTES // 2)
            everything += sum(taken) * plan.shape[0] * plan.shape[1]
        nothing = torch.zeros_like(iterate)
        return Stage(
            update=nothing,
            out=NOTHING,
            iterate=iterate,
            back=self.gathered(each.parts, each.records, replicas),
            gather=NOTHING,
            apply=nothing + everything * self.passing(APPLY_BYTES),
        )


@lru_cache(maxsize=4096)
def _iteration(plan: Bucket, count: int, gpu: Gpu, schedule: Schedule) -> float:
    return iteration_seconds(plan, count, gpu, schedule)
