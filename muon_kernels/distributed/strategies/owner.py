"""The strategy "owner": whole matrices go to owners, and their updates come back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from ...coefficients import Schedule
from ...layout import Matrices
from ...stages.packed import Packed
from ...step.plan import Bucket
from ...step.run import run_iteration
from ..collectives import Pending, gather
from ..lots import Kept, Lot, LotKey, in_memory, momenta_of, normalized, numbers_for, numbers_for_moments, params_of
from ..placement import Team
from ..slices import Buffers, Rectangle, Slices, end_of, gather_slices, in_turn, scale_of, to_half_norms

if TYPE_CHECKING:
    from ...step.work import Scalars
    from ...step.workspace import Workspace


class OwnerRound:
    """Round of matrices whose shards are on several ranks."""

    @classmethod
    def refuses(cls, key: LotKey) -> str | None:
        """Return why such matrices cannot be stepped by this strategy, so that they go to owners; None if they can."""
        return None

    @classmethod
    def turns(cls, rectangles: Sequence[Rectangle]) -> bool:
        """Whether to transpose square matrices with such shards."""
        return False

    @classmethod
    def owners(cls, team: Team) -> list[int] | None:
        """Return the ranks that matrices are assigned to, or None for all."""
        return None

    @classmethod
    def owner_here(cls, team: Team) -> int:
        """Return the rank whose matrices this rank iterates, one of those that matrices are assigned to."""
        return team.rank

    @classmethod
    def shapes(cls, key: LotKey) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (m, n) of the matrices that this rank iterates, and of the largest that any rank does."""
        return key.shape, key.shape

    @classmethod
    def counted(cls, bucket: Bucket, schedule: Schedule) -> Bucket:
        """Return the bucket with what the iteration costs by this strategy."""
        return bucket

    @classmethod
    def algorithm(cls, name: str, backend: str) -> str:
        """Return the form of the iteration, the same on all ranks; "auto" if each may choose."""
        return name

    def __init__(self, lot: Lot, start: int, kept: Kept) -> None:
        """Decide what goes where in a round.

        Args:
            lot: the matrices.
            start: index of each owner's first matrix in this round.
            kept: this rank's shards.
        """
        self.lot, self.start = lot, start
        team, key = lot.key.team, lot.key
        own = key.shards[team.shard]
        taken = [entries[start : start + lot.round_size] for entries in lot.entries]
        by_replica = [taken[r * team.shard_count : (r + 1) * team.shard_count] for r in range(team.replica_count)]
        here = by_replica[team.replica]
        # Slices of this rank's shard go to the owners of this replica; slices of what it owns come from all ranks.
        self.sent = in_turn([(len(entries), own) for entries in here])
        self.received = in_turn([(len(here[team.shard]), shard) for shard in key.shards])
        self.owned = len(here[team.shard])
        self.entries = [[entry for entries in replica for entry in entries] for replica in by_replica]
        there = bool(own.elements)
        self.momenta = [momenta_of(kept, entries if there else ()) for entries in self.entries]
        self.params = [params_of(kept, entries if there else ()) for entries in self.entries]
        self.ratios = [array("d", [entry.ratio for entry in entries]) for entries in self.entries]
        self.matrix_numbers = [array("i", [entry.number for entry in entries]) for entries in self.entries]
        self.share = max(map(len, self.entries))
        self.pending: Pending | None = None

    @property
    def begun(self) -> list[tuple[Lot, int]]:
        """The lot of this round, with the index of each owner's first matrix."""
        return [(self.lot, self.start)]

    @property
    def kept_packed(self) -> list[Packed]:
        """Parameters and momenta that go through fp32 memory."""
        return [packed for packed in (*self.params, *self.momenta) if isinstance(packed, Packed)]

    @property
    def numbers(self) -> int:
        """Fp32 numbers of memory for what is done to shards, at most at a time."""
        return max(*map(numbers_for, self.kept_packed), numbers_for_moments(self.lot, self.share), 0)

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Bytes of `Buffers.slices` and of `Buffers.owned`."""
        share, replicas = self.share * self.sent[0].record, self.lot.key.team.replica_count
        return max(end_of(self.sent), share), max(end_of(self.received), share * replicas * (replicas > 1))

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others."""
        team = self.lot.key.team
        out = end_of(self.sent) - self.sent[team.shard].bytes
        back = end_of(self.received) - self.received[team.shard].bytes
        return out + back + (team.replica_count - 1) * self.share * self.sent[0].record

    @property
    def collectives(self) -> int:
        """Number of collectives in a round."""
        return 2 + (self.lot.key.team.replicas is not None)

    def begin(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Update momenta and begin to send slices of the directions to their owners."""
        self.update_momenta(grads, scalars, buffers)
        self.pending = self._exchange(buffers.slices, self.sent, buffers.owned, self.received, "slices")

    def update_momenta(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Update momenta; write the directions of this replica's share, and their norms, to `buffers`."""
        team, work = self.lot.key.team, self.lot.work
        ops = backends.get(work.bucket.backend)
        for replica in [r for r in range(team.replica_count) if r != team.replica] + [team.replica]:
            entries, momenta = self.entries[replica], self.momenta[replica]
            if not self.params[replica] or (momenta is None and replica != team.replica):
                continue
            at = Slices(0, len(entries), self.sent[0].shard)
            directions = [Matrices(grads[e.param], e.grad_at) for e in entries if e.grad_at is not None]
            norms = buffers.norms[: len(entries)]
            # Every replica keeps all momenta. Only its own share's directions are of use, so they come last.
            x = at.of(buffers.slices, work.bucket.workspace_dtype)
            margin = work.schedule.margin
            for i, seen in in_memory(momenta, buffers.numbers):
                update = scalars.momentum_update(directions[i], seen, x[i], margin, norm=norms[i])
                scale = ops.momentum_update(update)
                if scale is not None and x.dtype == torch.float16:
                    to_half_norms(x[i], norms[i], scale, margin)
            if replica == team.replica:
                at.norms(buffers.slices).copy_(norms)

    def _exchange(
        self, source: Tensor, sent: Sequence[Slices], target: Tensor, received: Sequence[Slices], what: str
    ) -> Pending:
        return Pending(
            f"exchanging {what} of {self.lot}",
            lambda: dist.all_to_all_single(
                target[: end_of(received)],
                source[: end_of(sent)],
                [s.bytes for s in received],
                [s.bytes for s in sent],
                group=self.lot.key.team.shards,
                async_op=True,
            ),
        )

    def iterate(self, scalars: Scalars, workspace: Workspace, buffers: Buffers) -> None:
        """Assemble and orthogonalize the matrices that are owned here; begin to send slices of the results back."""
        assert self.pending is not None
        self.pending.wait()
        work, dtype = self.lot.work, self.lot.work.bucket.workspace_dtype
        if self.owned:
            stacks = workspace.stacks(work, self.owned)
            received = [(s.shard, s.of(buffers.owned, dtype), s.norms(buffers.owned)) for s in self.received if s.bytes]
            scaled = backends.get(work.bucket.backend).normalizes
            norms, shift = gather_slices(received, stacks.X, scaled)
            if stacks.blend is not None:
                stacks.blend.norms.copy_(norms)
            scale = None
            if not scaled:
                scale = stacks.derived.setdefault(
                    "scale", torch.empty(self.owned, dtype=torch.float32, device=stacks.X.device)
                )
                scale.copy_(scale_of(norms, shift, scalars.eps, work.schedule.margin))
            result = run_iteration(work, stacks, scale)
            for s in self.received:
                top, left, rows, cols = s.shard
                if s.bytes:
                    s.of(buffers.owned, dtype).copy_(result[:, top : top + rows, left : left + cols])
        self.pending = self._exchange(buffers.owned, self.received, buffers.slices, self.sent, "results")

    def end(self, scalars: Scalars, buffers: Buffers) -> None:
        """Update parameters with the slices of results that have come back."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        team, work = self.lot.key.team, self.lot.work
        ops, dtype = backends.get(work.bucket.backend), work.bucket.workspace_dtype
        size, shares = self.share * self.sent[0].record, [buffers.slices]
        if team.replicas is not None:
            gathered = buffers.owned[: team.replica_count * size]  # what was in it has gone
            gather(gathered, buffers.slices[:size], team, str(self.lot)).wait()
            shares = list(torch.split(gathered, size)) if size else [gathered] * team.replica_count
        for replica, share in enumerate(shares):
            params, entries, ratios = self.params[replica], self.entries[replica], self.ratios[replica]
            X = Slices(0, len(entries), self.sent[0].shard).of(share, dtype)
            # Called also where this rank has no shard: others wait for its sums.
            own = normalized(self.lot, entries, X, scalars.beta2, ratios, buffers.numbers)
            for at, seen in in_memory(params, buffers.numbers) if params else ():
                options = scalars.apply_options(self.matrix_numbers[replica][at], self.lot.key.window)
                ops.apply_update(scalars.apply_update(seen, X[at], own[at]), options)
