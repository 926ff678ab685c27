"""Rounds of matrices that several ranks have copies of, each orthogonalizing its share."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...layout import Bundle, Matrices
from ...stages.packed import Packed
from ...stages.second_moment import normalize
from ...step.run import run_iteration
from ..collectives import Pending, gather
from ..lots import Entry, Kept, Lot, in_memory, momenta_of, normalized, numbers_for, numbers_for_moments, params_of
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
            copies = [params_of(kept, entries) for entries in shares]
            self.lots.append(_Copies(lot, start, shares, own, copies))
        # Where in its share each rank has the results of each lot.
        self.places = [
            in_turn([(len(copies.shares[rank]), Rectangle(0, 0, *copies.lot.key.shape)) for copies in self.lots])
            for rank in range(self.team.replica_count)
        ]
        self.share = max(map(end_of, self.places))
        self.pending: Pending | None = None

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
        found = [packed for copies in self.lots for packed in (*copies.params, *copies.momenta)]
        return [packed for packed in found if isinstance(packed, Packed)]

    @property
    def numbers(self) -> int:
        """Fp32 numbers of memory for what is done to copies, at most at a time."""
        moments = [numbers_for_moments(lot, max(map(len, shares))) for lot, _, shares, *_ in self.lots]
        return max(*map(numbers_for, self.kept_packed), *moments, 0)

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Bytes of `Buffers.slices`, this rank's results, and of `Buffers.owned`, the results of all ranks."""
        return self.share, self.share * self.team.replica_count

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others."""
        return self.share * (self.team.replica_count - 1)

    @property
    def collectives(self) -> int:
        """Number of collectives in a round."""
        return 1

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
        self.pending = gather(
            buffers.owned[: self.share * self.team.replica_count],
            buffers.slices[: self.share],
            self.team,
            " and ".join(str(copies.lot) for copies in self.lots),
        )

    def end(self, scalars: Scalars, buffers: Buffers) -> None:
        """Update parameters with the results of all ranks."""
        assert self.pending is not None
        self.pending.wait()
        self.pending = None
        for i, copies in enumerate(self.lots):
            work, dtype = copies.lot.work, copies.lot.work.bucket.workspace_dtype
            for rank, (params, entries) in enumerate(zip(copies.params, copies.shares, strict=True)):
                if entries:
                    results = buffers.owned[rank * self.share : (rank + 1) * self.share]
                    place = self.places[rank][i]
                    X, ratios = place.of(results, dtype), array("d", [entry.ratio for entry in entries])
                    if copies.lot.second_moment is not None and copies.lot.owner_keeps_state:
                        ratios = array("d", map(mul, ratios, place.norms(results).tolist()))
                    else:
                        ratios = normalized(copies.lot, entries, X, scalars.beta2, ratios, buffers.numbers)
                    numbers = array("i", [entry.number for entry in entries])
                    for at, seen in in_memory(params, buffers.numbers):
                        backends.get(work.bucket.backend).apply_update(
                            scalars.apply_update(seen, X[at], ratios[at]),
                            scalars.apply_options(numbers[at], copies.lot.key.window),
                        )


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
    if not isinstance(momenta, Packed):
        return ops.momentum_update(
            scalars.momentum_update(grads, momenta, stacks.X, work.schedule.margin, stacks.scratch, norms)
        )
    found: Tensor | None = None
    for i, seen in in_memory(momenta, numbers):
        norm = None if norms is None else norms[i]
        update = scalars.momentum_update(grads[i], seen, stacks.X[i], work.schedule.margin, norm=norm)
        if (scale := ops.momentum_update(update)) is not None:
            kept = torch.empty(len(grads), dtype=torch.float32, device=stacks.X.device)
            found = stacks.derived.setdefault("scale", kept)
            found[i] = scale
    return found


class _Copies(NamedTuple):
    """Matrices of a lot in a round, listed by the rank that does them."""

    lot: Lot
    start: int
    shares: list[list[Entry]]
    momenta: list[Bundle | Packed | None]
    params: list[Bundle | Packed]
