"""Rounds of matrices that several ranks have copies of, each orthogonalizing its share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...layout import Bundle, Matrices
from ...stages.packed import Packed
from ...stages.second_moment import normalize
from ...step.run import run_iteration
from ..gathers import Run, parts_of, sent_by
from ..lots import Entry, Kept, Lot, Results, in_memory, momenta_of, numbers_for, numbers_for_moments
from ..slices import Buffers, Rectangle, end_of, in_turn

if TYPE_CHECKING:
    from ...step.work import Scalars, Work
    from ...step.workspace import Stacks, Workspace


class ReplicaRound:
    """Round of matrices that several ranks have copies of: each rank does its share. It may have several lots."""

    def __init__(
        self,
        lots: Sequence[tuple[Lot, int]],
        kept: Kept,
    ) -> None:
        """Decide who does what.

        Args:
            lots: each with the index of every owner's first matrix in this round.
            kept: the copies; the momentum of a matrix that another rank owns may be None.
        """
        momenta = kept.momenta
        self.team = lots[0][0].key.team
        self.lots = []
        for lot, start in lots:
            shares = [entries[start : start + lot.round_size] for entries in lot.entries]
            # Every rank keeps all momenta of copies that have no owner.
            keeps_all = [
                momenta is not None and all(momenta[entry.param] is not None for entry in entries) for entries in shares
            ]
            own = [momenta_of(kept, entries if keeps else ()) for entries, keeps in zip(shares, keeps_all, strict=True)]
            for momenta_here in own:
                _check(lot, momenta_here)
            self.lots.append(_Copies(lot, start, shares, own))
        # Where in its share each rank has the results of each lot.
        self.places = [
            in_turn([(len(copies.shares[rank]), Rectangle(0, 0, *copies.lot.key.shape)) for copies in self.lots])
            for rank in range(self.team.replica_count)
        ]
        self.share = max(map(end_of, self.places))
        records, most = [lot.largest_record for lot, _ in lots], max(lot.part_bytes for lot, _ in lots)
        self.parts = parts_of(self.places, records, most, self.team.replica)
        self.results = [self._results(kept, run) for part in self.parts for run, _ in part.runs]

    def _results(self, kept: Kept, run: Run) -> Results:
        lot, _, shares, _ = self.lots[run.lot]
        return Results.of(lot, kept, shares[run.replica][run.start : run.start + run.matrices])

    @property
    def momenta(self) -> list[Bundle | Packed | None]:
        """Momenta of all ranks' matrices; None or empty where they are not kept here."""
        return [bundle for copies in self.lots for bundle in copies.momenta]

    @property
    def begun(self) -> list[tuple[Lot, int]]:
        """The lots of this round, each with the index of every owner's first matrix."""
        return [(copies.lot, copies.start) for copies in self.lots]

    @property
    def kept_packed(self) -> list[Packed]:
        """Parameters and momenta that go through fp32 memory."""
        found = [each.params for each in self.results] + self.momenta
        return [packed for packed in found if isinstance(packed, Packed)]

    @property
    def numbers(self) -> int:
        """Fp32 numbers of memory for what is done to copies, at most at a time."""
        moments = [numbers_for_moments(lot, max(map(len, shares))) for lot, _, shares, *_ in self.lots]
        return max(*map(numbers_for, self.kept_packed), *moments, 0)

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Bytes of `Buffers.slices`, this rank's results, and of `Buffers.owned`, of which copies need nothing."""
        return end_of(self.places[self.team.replica]), 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others, its own results and those that it passes on in a ring."""
        return sent_by(self.team.replica, [end_of(own) for own in self.places])

    @property
    def collectives(self) -> int:
        """Number of collectives in a round."""
        return len(self.parts)

    def begin(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Remember the gradients; there is nothing to send yet."""
        self.grads = grads

    def iterate(self, scalars: Scalars, workspace: Workspace, buffers: Buffers) -> None:
        """Orthogonalize this rank's share and begin to send it to the others."""
        for copies, place in zip(self.lots, self.places[self.team.replica], strict=True):
            work, dtype = copies.lot.work, copies.lot.work.bucket.workspace_dtype
            turns = [r for r in range(self.team.replica_count) if r != self.team.replica] + [self.team.replica]
            for rank in turns:  # this rank's share last: of the others' only momenta are updated
                momenta, entries = copies.momenta[rank], copies.shares[rank]
                if not entries or (rank != self.team.replica and not momenta):
                    continue
                stacks = workspace.stacks(work, len(entries))
                grads = [Matrices(self.grads[e.param], e.grad_at) for e in entries if e.grad_at is not None]
                scale = _directions(work, scalars, grads, momenta, stacks, buffers.numbers)
                if rank == self.team.replica:
                    result = run_iteration(work, stacks, scale)
                    if copies.lot.second_moment is not None and copies.lot.owner_keeps_state:
                        moments = [e.moment for e in entries if e.moment is not None]
                        kept = normalize(copies.lot.second_moment, result, moments, scalars.beta2, stacks.stage_scratch)
                        own = place.norms(buffers.slices)
                        own.copy_(torch.tensor(kept or [1.0] * len(entries), dtype=torch.float64, device="cpu"))
                    place.of(buffers.slices, dtype).copy_(result)
        buffers.gathers.offer(buffers.slices, self.parts, " and ".join(str(copies.lot) for copies in self.lots))

    def end(self, scalars: Scalars, buffers: Buffers) -> None:
        """Update parameters with the results of all ranks."""
        for results, (_, place, memory) in zip(self.results, buffers.gathers.take(self.parts), strict=True):
            lot = results.lot
            sizes = place.norms(memory) if lot.second_moment is not None and lot.owner_keeps_state else None
            results.apply(place.of(memory, lot.work.bucket.workspace_dtype), scalars, buffers.numbers, sizes)


def _directions(
    work: Work,
    scalars: Scalars,
    grads: Sequence[Matrices],
    momenta: Bundle | Packed | None,
    stacks: Stacks,
    numbers: Tensor,
) -> Tensor | None:
    """Update momenta and write the directions to the stack; return their scale, at the same place in every step."""
    ops, norms = backends.get(work.bucket.backend), None if stacks.blend is None else stacks.blend.norms
    if not isinstance(momenta, Packed) and len(_dtypes(momenta)) < 2:
        return ops.momentum_update(
            scalars.momentum_update(grads, momenta, stacks.X, work.schedule.margin, stacks.scratch, norms)
        )
    found: Tensor | None = None
    for i, seen in in_memory(momenta, numbers) if isinstance(momenta, Packed) else _one_by_one(momenta):
        norm = None if norms is None else norms[i]
        update = scalars.momentum_update(grads[i], seen, stacks.X[i], work.schedule.margin, norm=norm)
        if (scale := ops.momentum_update(update)) is not None:
            kept = torch.empty(len(grads), dtype=torch.float32, device=stacks.X.device)
            found = stacks.derived.setdefault("scale", kept)
            found[i] = scale
    return found


def _dtypes(momenta: Bundle | Packed | None) -> set[torch.dtype]:
    return {matrices.tensor.dtype for matrices in momenta} if isinstance(momenta, Bundle) else set()


def _one_by_one(momenta: Bundle | None) -> Iterator[tuple[slice, list[Matrices]]]:
    """Yield momenta each by itself: those that a checkpoint has brought may be of another dtype than new ones."""
    for i, matrices in enumerate(momenta or ()):
        yield slice(i, i + 1), [matrices]


def _check(lot: Lot, momenta: Bundle | Packed | None) -> None:
    """Raise ValueError where the backend that all ranks have chosen cannot take the momenta that this one keeps."""
    bucket = lot.work.bucket
    for dtype in _dtypes(momenta) - {lot.key.momentum_dtype}:
        if reason := backends.get(bucket.backend).refuses(lot.key.device, [dtype], bucket.workspace_dtype):
            raise ValueError(
                f"momentum_buffer should be of {lot.key.momentum_dtype}, which the other ranks take it to be of, or of "
                f"another dtype that backend {bucket.backend!r} takes, but is of {dtype} ({reason.partition(';')[0]}); "
                f"set momentum_dtype to {dtype}"
            )


class _Copies(NamedTuple):
    """Matrices of a lot in a round, listed by the rank that does them."""

    lot: Lot
    start: int
    shares: list[list[Entry]]
    momenta: list[Bundle | Packed | None]
