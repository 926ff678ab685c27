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
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..coefficients import Schedule
from ..layout import Bundle, Layout, Matrices, Piece, flattens, layout, split_shape
from ..plan import Bucket, Shared, plan_bucket, workspace_bytes
from ..second_moment import normalize, scratch_numbers
from ..split import pieces
from . import second_moment
from .deal import deal
from .placement import Placement, Range, Team

if TYPE_CHECKING:
    from ..functional import Scalars, Stacks, Work, Workspace

# One a parameter, but where another rank keeps it; None where the direction is the gradient.
Momenta = Sequence[Tensor | None] | None
Iterate = Callable[["Work", "Stacks", "Tensor | None"], Tensor]

# Slices of so many rounds are under way before one is multiplied, and results of so many are not waited for yet: a rank
# that has more to do in one round than in the next holds up no one.
_AHEAD, _LATE = 2, 2
# Sets of buffers, of a round each.
IN_FLIGHT = _AHEAD + 1 + _LATE
# Of a rank's results, what is worth a collective of its own.
SHARE_BYTES = 16 << 20
NORM_BYTES = 8  # bytes of a double


class Rectangle(NamedTuple):
    """Of a matrix that is no taller than wide."""

    top: int
    left: int
    rows: int
    cols: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return self.rows * self.cols


class Entry(NamedTuple):
    """One matrix; where this rank holds none of it, without layouts.

    Attributes:
        param: index of the parameter.
        ratio: of the learning rate.
        tall: whether the parameter has it transposed.
        moment: second moment of this rank's part, as the parameter has it, if one is kept here.
    """

    param: int
    param_at: Layout | None
    momentum_at: Layout | None
    grad_at: Layout | None
    ratio: float
    tall: bool
    moment: Tensor | None


class Kind(NamedTuple):
    """What the matrices of a lot have in common."""

    team: Team
    shape: tuple[int, int]
    parts: tuple[Rectangle, ...]
    device: torch.device
    grad_dtype: torch.dtype
    param_dtype: torch.dtype


def holders(kind: Kind) -> list[int]:
    """The ranks that have any of such a matrix."""
    return [rank for rank, part in enumerate(kind.parts) if part.elements]


def _overlap(a: Range, b: Range) -> Range:
    """What both have, counted from the start of `a`; empty ranges begin at 0."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start - a[0], stop - a[0]) if start < stop else (0, 0)


def cuts(
    placement: Placement, flatten: bool | None, split: str | None
) -> Iterator[tuple[Piece | None, tuple[int, int, int], tuple[Rectangle, ...]]]:
    """(piece of this rank's part, (batch, rows, cols) of the whole, every rank's rectangle of (rows, cols))."""
    whole, ndim = placement.whole, len(placement.whole)
    row, col = (0, 1) if flattens(whole, flatten) else (ndim - 2, ndim - 1)
    is_cut = [any(part[dim] != (0, n) for part in placement.parts) for dim, n in enumerate(whole)]
    own = placement.parts[placement.team.shard]
    dims = {piece.dim for piece in pieces(whole, flatten, split) if piece is not None}
    apart = any(is_cut[dim] for dim in dims)
    for piece in pieces(whole, flatten, split, apart):
        batch, rows, cols = split_shape(whole, flatten, piece)
        here = piece
        if piece is not None and is_cut[piece.dim] and piece.runs != 1:
            raise ValueError(
                f"split={split!r} should cut another dimension than {piece.dim}, along which the parameter of size "
                f"{whole} is sharded, or to parts that are contiguous"
            )
        rectangles = []
        for rank, part in enumerate(placement.parts):
            # Of the rows and columns of this piece, those that a rank has.
            spans = {row: (0, rows), col: (0, cols)}
            for dim in (row, col):
                if not is_cut[dim]:
                    continue
                if piece is not None and piece.dim == dim:
                    at = (piece.start, piece.start + piece.size)
                    spans[dim] = _overlap(at, part[dim])
                    if rank == placement.team.shard:
                        start, stop = _overlap(own[dim], at)
                        here = Piece(dim, start, 1, stop - start, 1, stop - start)
                elif dim == row or not flattens(whole, flatten):
                    spans[dim] = part[dim]
            (top, bottom), (left, right) = spans[row], spans[col]
            empty = top == bottom or left == right
            rectangles.append(Rectangle(0, 0, 0, 0) if empty else Rectangle(top, left, bottom - top, right - left))
        yield here, (batch, rows, cols), tuple(rectangles)


def _layouts(t: Tensor, flatten: bool | None, piece: Piece | None, batch: int, tall: bool) -> list[Layout]:
    """Of every matrix of this rank's part `t`, lying as the whole does."""
    order = tuple(range(1, t.ndim)) if flattens(t.shape, flatten) else ()
    found = []
    for i in range(batch):
        at = layout(tuple(t.shape), t.stride(), flatten, order, piece, i, i + 1)
        if at is None:
            raise ValueError(
                f"the part of a sharded parameter, gradient or momentum should be contiguous but of size "
                f"{tuple(t.shape)} one has strides: {t.stride()}"
            )
        if at.transposed != tall:
            at = at._replace(
                rows=at.cols, cols=at.rows, row_stride=at.col_stride, col_stride=at.row_stride, transposed=tall
            )
        found.append(at)
    return found


@dataclass
class Lot:
    """Equal matrices, equally cut, by owner.

    Attributes:
        kind: what they have in common.
        work: how an owner iterates.
        number: of the first one among all of the group; for stochastic rounding.
        entries: for every rank of the team, what it owns.
        most: matrices of one owner in a round.
        way: of the rounds, where the matrices are cut.
        kept_apart: whether each owner alone keeps the state of its matrices.
    """

    kind: Kind
    work: Work
    number: int
    entries: list[list[Entry]]
    most: int
    way: type[CutRound]
    kept_apart: bool

    @property
    def rounds(self) -> int:
        """How many."""
        return -(-max(map(len, self.entries)) // self.most)

    def __str__(self) -> str:
        """Name it in an error."""
        m, n = self.kind.shape
        return f"the bucket of {sum(map(len, self.entries))} x {m}x{n}"


def record_bytes(elements: int) -> int:
    """Of a slice and its norm, a multiple of 8; none of an empty one."""
    return (-(-2 * elements // NORM_BYTES) + 1) * NORM_BYTES if elements else 0


def in_round(most: int, bytes_each: int, cap: int) -> int:
    """Of an owner's matrices, no more than `most`, how many go through at a time, if they are to fit `cap`."""
    rounds = -(-most // max(1, cap // bytes_each))
    return -(-most // rounds)


def bytes_in_flight(workspace_bytes: int, elements: int, replicas: int) -> int:
    """Of one matrix of each owner in a round: of its workspace, and of buffers; there is one from every replica."""
    return workspace_bytes + IN_FLIGHT * 2 * elements * (1 + replicas)


def share_bytes(cap: int, ranks: int) -> int:
    """Of a rank's results, how many go in one collective, but for the last lot's: all ranks' have to fit `cap`."""
    return min(SHARE_BYTES, cap // (IN_FLIGHT * (1 + ranks)))


class _Slices(NamedTuple):
    """Slices of one owner's matrices, all of one rank's part, in a buffer: each with room for its norm behind it."""

    offset: int  # in bytes
    matrices: int
    part: Rectangle

    @property
    def record(self) -> int:
        """Bytes of a slice and what belongs to it."""
        return record_bytes(self.part.elements)

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.matrices * self.record

    def of(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """(count, rows, cols)."""
        _, _, rows, cols = self.part
        flat = buffer[self.offset : self.offset + self.bytes].view(dtype)
        return flat.as_strided((self.matrices, rows, cols), (self.record // 2, cols, 1))

    def norms(self, buffer: Tensor) -> Tensor:
        """(count,) float64."""
        flat = buffer[self.offset : self.offset + self.bytes].view(torch.float64)
        step = self.record // NORM_BYTES
        return flat.as_strided((self.matrices,), (step,), flat.storage_offset() + step - 1)


def _in_turn(counts: Sequence[tuple[int, Rectangle]]) -> list[_Slices]:
    """One after the other in a buffer."""
    found, offset = [], 0
    for count, part in counts:
        found.append(_Slices(offset, count, part))
        offset += found[-1].bytes
    return found


def _all(slices: Sequence[_Slices]) -> _Slices:
    """Those of several owners that follow one another, of the same part."""
    return _Slices(slices[0].offset, sum(s.matrices for s in slices), slices[0].part)


def _end(slices: Sequence[_Slices]) -> int:
    return slices[-1].offset + slices[-1].bytes


# Exponents beyond which `momentum_update` writes a matrix times a power of two; see csrc/muon_kernels.h.
_UNSCALED = 30


def shift_of(norms: Tensor) -> Tensor:
    """Of matrices with these norms, the exponent of that power."""
    exponent = torch.frexp(norms)[1]
    outside = norms.isfinite() & (norms != 0) & ((norms < 2.0**-_UNSCALED) | (norms > 2.0**_UNSCALED))
    return (1 - exponent).where(outside, 0)


def scale_of(norms: Tensor, shift: Tensor, eps: float, margin: float) -> Tensor:
    """What brings matrices of these norms, times 2^shift, to 1/margin, as `momentum_update` returns it."""
    mantissa, exponent = torch.frexp(norms)
    size = torch.ldexp(1 / ((2 * mantissa).clamp_min(eps) * margin), 1 - exponent - shift)
    return size.where(norms.isfinite(), torch.nan).where(norms != 0, 0.0).float()


def _gathered(parts: Sequence[tuple[Rectangle, Tensor, Tensor]], X: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    """Put the matrices together.

    Args:
        parts: (where, slices, their norms) of every rank that has any.
        X: (count, m, n), written.
        scaled: whether slices come times a factor that brings their norm to 1/margin.

    Returns:
        (count,) norms of the directions in double, and the exponents of the powers of two that X was multiplied by.
    """
    norms = torch.stack([part[2] for part in parts]).square_().sum(0).sqrt_()
    shift = shift_of(norms)
    for (top, left, rows, cols), slices, of_slice in parts:
        target = X[:, top : top + rows, left : left + cols]
        if scaled:
            target.copy_(slices.float().mul_((of_slice / norms).nan_to_num_(0.0).float()[:, None, None]))
            continue
        power = torch.ldexp(torch.ones_like(norms), shift - shift_of(of_slice))
        if X.device.type == "cpu" and bool((power == 1).all()):
            target.copy_(slices)
        else:
            torch.mul(slices, power.to(X.dtype)[:, None, None], out=target)
    return norms, shift


@dataclass
class Buffers:
    """Of one round: slices of what is cut here, and of what is owned here; bytes."""

    slices: Tensor
    owned: Tensor
    norms: Tensor


class Failed(RuntimeError):
    """A collective that did not end."""


class Pending:
    """A collective under way; `what` it does is said if it fails."""

    def __init__(self, what: str, begin: Callable[[], Any]) -> None:
        self._what = what
        self._work = self._do(begin)

    def wait(self) -> None:
        """Until it has ended."""
        self._do(self._work.wait)

    def _do(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            raise Failed(f"{self._what}: {error}") from error


# By its name since torch 2.13, and the one that it has there no more without a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(into: Tensor, share: Tensor, team: Team, of: str) -> Pending:
    """Begin to write what every replica has to all of them; `of` names it in an error."""
    return Pending(
        f"gathering the results of {of}",
        lambda: _all_gather(into, share, group=team.replicas, async_op=True),
    )


class CutRound:
    """A round of matrices whose parts are on several ranks."""

    @classmethod
    def refuses(cls, kind: Kind) -> str | None:
        """Why such matrices cannot go through in this way, so that they are sent to owners; None if they can."""
        return None

    @classmethod
    def turns(cls, rectangles: Sequence[Rectangle]) -> bool:
        """Whether square matrices with such parts should be transposed."""
        return False

    @classmethod
    def owners(cls, team: Team) -> list[int] | None:
        """The ranks that matrices are dealt to; None for all."""
        return None

    @classmethod
    def owner_here(cls, team: Team) -> int:
        """Of the ranks that matrices are dealt to, the one whose matrices this rank iterates."""
        return team.rank

    @classmethod
    def shapes(cls, kind: Kind) -> tuple[tuple[int, int], tuple[int, int]]:
        """(m, n) of what this rank iterates, and of the largest that any does."""
        return kind.shape, kind.shape

    @classmethod
    def counted(cls, bucket: Bucket, schedule: Schedule) -> Bucket:
        """The bucket with what the iteration costs in this way."""
        return bucket

    @classmethod
    def algorithm(cls, name: str, backend: str) -> str:
        """The form of the iteration, the same on all ranks; "auto" if each may choose."""
        return name

    def __init__(self, lot: Lot, first: int, params: Sequence[Tensor], momenta: Momenta) -> None:
        """Settle what goes where.

        Args:
            lot: the matrices.
            first: of each owner's, the first in this round.
            params, momenta: this rank's parts; None: the direction is the gradient.
        """
        self.lot, self.first = lot, first
        team, kind = lot.kind.team, lot.kind
        own = kind.parts[team.shard]
        taken = [entries[first : first + lot.most] for entries in lot.entries]
        by_replica = [taken[r * team.shard_count : (r + 1) * team.shard_count] for r in range(team.replica_count)]
        here = by_replica[team.replica]
        # What this rank's part goes through: to the owners of this replica, and at last from all.
        self.sent = _in_turn([(len(entries), own) for entries in here])
        self.received = _in_turn([(len(here[team.shard]), part) for part in kind.parts])
        self.owned = len(here[team.shard])
        self.entries = [[entry for entries in replica for entry in entries] for replica in by_replica]
        there = bool(own.elements)
        self.momenta = [
            None if momenta is None else _bundle_of(momenta, entries if there else (), "momentum_at")
            for entries in self.entries
        ]
        self.params = [_bundle_of(params, entries, "param_at") if there else Bundle() for entries in self.entries]
        self.ratios = [array("d", [entry.ratio for entry in entries]) for entries in self.entries]
        self.share = max(map(len, self.entries))
        self.pending: Pending | None = None

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Of `Buffers.slices` and `Buffers.owned`."""
        share, replicas = self.share * self.sent[0].record, self.lot.kind.team.replica_count
        return max(_end(self.sent), share), max(_end(self.received), share * replicas * (replicas > 1))

    @property
    def bytes_sent(self) -> int:
        """By this rank to others."""
        team = self.lot.kind.team
        out = _end(self.sent) - self.sent[team.shard].bytes
        back = _end(self.received) - self.received[team.shard].bytes
        return out + back + (team.replica_count - 1) * self.share * self.sent[0].record

    @property
    def collectives(self) -> int:
        """Calls that it takes."""
        return 2 + (self.lot.kind.team.replicas is not None)

    def begin(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Update momenta and send slices of the directions off."""
        self.update_momenta(grads, scalars, buffers)
        self.pending = self._exchange(buffers.slices, self.sent, buffers.owned, self.received, "slices")

    def update_momenta(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """And leave the directions of this replica's share, and their norms, in `buffers`."""
        team, work = self.lot.kind.team, self.lot.work
        ops = backends.get(work.bucket.backend)
        for replica in [r for r in range(team.replica_count) if r != team.replica] + [team.replica]:
            entries, momenta = self.entries[replica], self.momenta[replica]
            if not self.params[replica] or (momenta is None and replica != team.replica):
                continue
            at = _Slices(0, len(entries), self.sent[0].part)
            directions = [Matrices(grads[e.param], e.grad_at) for e in entries if e.grad_at is not None]
            norms = buffers.norms[: len(entries)]
            # Every replica keeps all momenta; what others will send is written over.
            ops.momentum_update(
                directions,
                momenta,
                at.of(buffers.slices, work.bucket.workspace_dtype),
                **scalars.of_momentum(),
                margin=work.schedule.margin,
                norms=norms,
            )
            if replica == team.replica:
                at.norms(buffers.slices).copy_(norms)

    def _exchange(
        self, source: Tensor, sent: Sequence[_Slices], target: Tensor, received: Sequence[_Slices], what: str
    ) -> Pending:
        return Pending(
            f"exchanging {what} of {self.lot}",
            lambda: dist.all_to_all_single(
                target[: _end(received)],
                source[: _end(sent)],
                [s.bytes for s in received],
                [s.bytes for s in sent],
                group=self.lot.kind.team.shards,
                async_op=True,
            ),
        )

    def iterate(self, scalars: Scalars, workspace: Workspace, buffers: Buffers, run: Iterate) -> None:
        """Put together what is owned here, orthogonalize it and send slices of it back."""
        assert self.pending is not None
        self.pending.wait()
        work, dtype = self.lot.work, self.lot.work.bucket.workspace_dtype
        if self.owned:
            stacks = workspace.stacks(work, self.owned)
            parts = [(s.part, s.of(buffers.owned, dtype), s.norms(buffers.owned)) for s in self.received if s.bytes]
            scaled = backends.get(work.bucket.backend).normalizes()
            norms, shift = _gathered(parts, stacks.X, scaled)
            if stacks.blend is not None:
                stacks.blend.norms.copy_(norms)
            scale = None
            if not scaled:
                scale = stacks.derived.setdefault(
                    "scale", torch.empty(self.owned, dtype=torch.float32, device=stacks.X.device)
                )
                scale.copy_(scale_of(norms, shift, scalars.eps, work.schedule.margin))
            result = run(work, stacks, scale)
            for s in self.received:
                top, left, rows, cols = s.part
                if s.bytes:
                    s.of(buffers.owned, dtype).copy_(result[:, top : top + rows, left : left + cols])
        self.pending = self._exchange(buffers.owned, self.received, buffers.slices, self.sent, "results")

    def end(self, scalars: Scalars, buffers: Buffers) -> None:
        """Update parameters with the slices that come back."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        team, work = self.lot.kind.team, self.lot.work
        ops, dtype = backends.get(work.bucket.backend), work.bucket.workspace_dtype
        size, shares = self.share * self.sent[0].record, [buffers.slices]
        if team.replicas is not None:
            gathered = buffers.owned[: team.replica_count * size]  # what was in it has gone
            gather(gathered, buffers.slices[:size], team, str(self.lot)).wait()
            shares = list(torch.split(gathered, size)) if size else [gathered] * team.replica_count
        first = self.first * team.ranks
        for params, entries, ratios, share in zip(self.params, self.entries, self.ratios, shares, strict=True):
            X = _Slices(0, len(entries), self.sent[0].part).of(share, dtype)
            # Also where this rank has no part: others wait for its sums.
            own = _normalized(self.lot, entries, X, scalars.beta2, ratios)
            if params:
                ops.apply_update(params, X, **scalars.of_update(self.lot.number, first), ratios=own)
            first += len(ratios)


def _normalized(lot: Lot, entries: Sequence[Entry], X: Tensor, beta2: float, ratios: array[float]) -> array[float]:
    """Divide X, this rank's parts of results, by second moments; return the ratios that are left."""
    form, team = lot.work.second_moment, lot.kind.team
    if form is None:
        return ratios
    own, (m, n) = array("d", ratios), lot.kind.shape
    top, left, height, width = lot.kind.parts[team.shard]
    for tall in (False, True):  # rows of the parameters are columns of X, or rows
        chosen = [i for i, entry in enumerate(entries) if entry.tall == tall]
        if not chosen:
            continue
        parts = X[chosen] if height * width else X.new_empty(len(chosen), 0, 0)
        kept = second_moment.normalize(
            form,
            parts.mT if tall else parts,
            [entry.moment for entry in (entries[i] for i in chosen) if entry.moment is not None],
            beta2,
            rows=n if tall else m,
            at=(left, left + width) if tall else (top, top + height),
            width=m if tall else n,
            whole_rows=all((part.rows if tall else part.cols) in (0, m if tall else n) for part in lot.kind.parts),
            group=team.shards,
        )
        if height * width:
            X[chosen] = parts
        for i, factor in zip(chosen, kept, strict=True):
            own[i] *= factor
    return own


def _bundle_of(tensors: Sequence[Tensor | None], entries: Sequence[Entry], which: str) -> Bundle:
    bundle = Bundle()
    for entry in entries:
        tensor, at = tensors[entry.param], getattr(entry, which)
        assert tensor is not None and at is not None
        bundle.append(Matrices(tensor, at))
    return bundle


class CopyRound:
    """A round of matrices of which several ranks have copies and each does its share; of several lots, one by one."""

    def __init__(
        self,
        lots: Sequence[tuple[Lot, int]],
        params: Sequence[Tensor],
        momenta: Momenta,
    ) -> None:
        """Settle who does what.

        Args:
            lots: and of each, the first of every owner's matrices in this round.
            params, momenta: the copies; there may be no momentum of what others own.
        """
        self.team = lots[0][0].kind.team
        self.lots = []
        for lot, first in lots:
            shares = [entries[first : first + lot.most] for entries in lot.entries]
            # Of copies without an owner every rank keeps all momenta.
            kept = [
                momenta is not None and all(momenta[entry.param] is not None for entry in entries) for entries in shares
            ]
            own = [
                None if momenta is None else _bundle_of(momenta, entries if keeps else (), "momentum_at")
                for entries, keeps in zip(shares, kept, strict=True)
            ]
            copies = [_bundle_of(params, entries, "param_at") for entries in shares]
            self.lots.append(_Copies(lot, first, shares, own, copies))
        # Where in its share every rank has its results.
        self.places = [
            _in_turn([(len(copies.shares[rank]), Rectangle(0, 0, *copies.lot.kind.shape)) for copies in self.lots])
            for rank in range(self.team.replica_count)
        ]
        self.share = max(map(_end, self.places))
        self.pending: Pending | None = None

    @property
    def momenta(self) -> list[Bundle | None]:
        """Of all ranks' matrices, those that are kept here."""
        return [bundle for copies in self.lots for bundle in copies.momenta]

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Of `Buffers.slices`, this rank's results, and `Buffers.owned`, everybody's."""
        return self.share, self.share * self.team.replica_count

    @property
    def bytes_sent(self) -> int:
        """By this rank to others."""
        return self.share * (self.team.replica_count - 1)

    @property
    def collectives(self) -> int:
        """Calls that it takes."""
        return 1

    def begin(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Remember the gradients: there is nothing to send yet."""
        self.grads = grads

    def iterate(self, scalars: Scalars, workspace: Workspace, buffers: Buffers, run: Iterate) -> None:
        """Orthogonalize this rank's share and send it to the others."""
        for copies, place in zip(self.lots, self.places[self.team.replica], strict=True):
            work, dtype = copies.lot.work, copies.lot.work.bucket.workspace_dtype
            ops = backends.get(work.bucket.backend)
            turns = [r for r in range(self.team.replica_count) if r != self.team.replica] + [self.team.replica]
            for rank in turns:  # its own share last, for those of others leave nothing but momenta
                momenta, entries = copies.momenta[rank], copies.shares[rank]
                if not entries or (rank != self.team.replica and not momenta):
                    continue
                stacks = workspace.stacks(work, len(entries))
                scale = ops.momentum_update(
                    [Matrices(self.grads[e.param], e.grad_at) for e in entries if e.grad_at is not None],
                    momenta,
                    stacks.X,
                    **scalars.of_momentum(),
                    margin=work.schedule.margin,
                    scratch=stacks.scratch,
                    norms=None if stacks.blend is None else stacks.blend.norms,
                )
                if rank == self.team.replica:
                    result = run(work, stacks, scale)
                    if work.second_moment is not None and copies.lot.kept_apart:
                        moments = [(V.mT if e.tall else V)[None] for e in entries for V in (e.moment,) if V is not None]
                        kept = normalize(work.second_moment, result, moments, scalars.beta2, stacks.between)
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
        """Update parameters with everybody's results."""
        assert self.pending is not None
        self.pending.wait()
        self.pending = None
        for number, copies in enumerate(self.lots):
            work, dtype = copies.lot.work, copies.lot.work.bucket.workspace_dtype
            first = copies.first * self.team.replica_count
            for rank, (params, entries) in enumerate(zip(copies.params, copies.shares, strict=True)):
                if entries:
                    results = buffers.owned[rank * self.share : (rank + 1) * self.share]
                    place = self.places[rank][number]
                    X, ratios = place.of(results, dtype), array("d", [entry.ratio for entry in entries])
                    if work.second_moment is not None and copies.lot.kept_apart:
                        ratios = array("d", map(mul, ratios, place.norms(results).tolist()))
                    else:
                        ratios = _normalized(copies.lot, entries, X, scalars.beta2, ratios)
                    backends.get(work.bucket.backend).apply_update(
                        params, X, **scalars.of_update(copies.lot.number, first), ratios=ratios
                    )
                first += len(entries)


class _Copies(NamedTuple):
    """A lot's matrices in a round, for every rank."""

    lot: Lot
    first: int
    shares: list[list[Entry]]
    momenta: list[Bundle | None]
    params: list[Bundle]


class Exchange:
    """The step of all matrices of a team.

    Attributes:
        team: the ranks.
        rounds: in order.
    """

    def __init__(self, team: Team, rounds: Sequence[CutRound | CopyRound]) -> None:
        """Nothing is allocated yet."""
        self.team, self.rounds = team, list(rounds)
        self._buffers: list[Buffers] = []

    @property
    def works(self) -> list[Work]:
        """How this rank iterates what it owns."""
        return [lot.work for lot in self.lots]

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
        most = max(max(map(len, lot.entries)) for lot in self.lots)
        return slices, owned, most * self.team.shard_count

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
    def plan(self) -> Shared:
        """What a plan has of it."""
        entries = [(lot, of_rank) for lot in self.lots for of_rank in lot.entries]
        return Shared(
            ranks=self.team.ranks,
            matrices=sum(len(of_rank) for _, of_rank in entries),
            owned=sum(len(lot.entries[self.team.rank]) for lot in self.lots),
            elements=sum(len(of_rank) * math.prod(lot.kind.shape) for lot, of_rank in entries),
            bytes_sent=self.bytes_sent,
            collectives=self.collectives,
            state_bytes=self.state_bytes,
            buffer_bytes=self.buffer_bytes,
        )

    def reserve(self) -> None:
        """Allocate buffers."""
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
        lots = [lot for r in self.rounds for lot in ([r.lot] if isinstance(r, CutRound) else [c.lot for c in r.lots])]
        return list({id(lot): lot for lot in lots}.values())

    def run(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace, run: Iterate) -> None:
        """Do the step.

        Args:
            grads: this rank's parts.
            scalars: of this step.
            workspace: in which there is room for `works`.
            run: from the normalised stack to the result.

        Raises:
            Failed: a collective did not end; some matrices may be stepped and others not.
        """
        rounds, buffers = self.rounds, self._buffers
        for i in range(-_AHEAD, len(rounds) + _LATE):
            if 0 <= i + _AHEAD < len(rounds):
                rounds[i + _AHEAD].begin(grads, scalars, buffers[(i + _AHEAD) % IN_FLIGHT])
            if 0 <= i < len(rounds):
                rounds[i].iterate(scalars, workspace, buffers[i % IN_FLIGHT], run)
            if i >= _LATE:
                rounds[i - _LATE].end(scalars, buffers[(i - _LATE) % IN_FLIGHT])


def prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Momenta,
    placements: Sequence[Placement | None],
    *,
    schedule: Schedule,
    ratio: Callable[[int, int, int], float],
    flatten: bool | None,
    splits: Sequence[str | None] | None,
    ns_algorithm: str,
    backend: str,
    max_workspace_bytes: int | None,
    workspace_dtype: torch.dtype,
    sign_momentum: bool,
    form: str | None,
    moments: Sequence[Tensor | None],
    work: Callable[..., Work],
    way: type[CutRound] = CutRound,
) -> list[Exchange]:
    """How the parameters that have a placement are stepped, a team at a time; nothing is written.

    Args:
        params, grads, momenta: this rank's parts; no momentum of what another rank owns, and none at all where the
            direction is the gradient.
        placements: where they are; None for those that are stepped alone.
        schedule: what to iterate.
        ratio: of the learning rate, for (index of a parameter, rows, cols).
        flatten, splits, ns_algorithm, backend, max_workspace_bytes, workspace_dtype, sign_momentum: see
            `functional.prepare`.
        form: of second moments, and `moments` this rank's parts, none of what another rank keeps.
        work: makes one of (bucket, notes, schedule, device).
        way: of the rounds of what is cut, where it can.

    Raises:
        ValueError, TypeError, RuntimeError: what cannot be stepped.
    """
    by_kind: dict[Kind, list[tuple[int | None, Entry]]] = {}
    for index, (p, g, placement) in enumerate(zip(params, grads, placements, strict=True)):
        if placement is None:
            continue
        buffer = None if momenta is None else momenta[index]
        for piece, (batch, rows, cols), rectangles in cuts(placement, flatten, splits[index] if splits else None):
            tall = rows > cols or (rows == cols and way.turns(rectangles))
            if tall:
                rectangles = tuple(Rectangle(left, top, c, r) for top, left, r, c in rectangles)
            kind = Kind(placement.team, (min(rows, cols), max(rows, cols)), rectangles, p.device, g.dtype, p.dtype)
            here = rectangles[placement.team.shard].elements > 0
            ats = [
                _layouts(t, flatten, piece, batch, tall) if t is not None and here else [None] * batch
                for t in (p, buffer, g)
            ]
            V = moments[index] if form is not None else None
            views = [None] * batch if form is None or V is None or not here else second_moment.views(form, V, flatten)
            found = by_kind.setdefault(kind, [])
            found += [
                (placement.owner, Entry(index, of_p, of_buffer, of_g, ratio(index, rows, cols), tall, view))
                for of_p, of_buffer, of_g, view in zip(*ats, views, strict=True)
            ]

    exchanges = []
    for team in dict.fromkeys(kind.team for kind in by_kind):
        kinds = {
            kind: entries for kind, entries in by_kind.items() if kind.team is team and entries and min(kind.shape)
        }
        chosen, ways = {}, {}
        for kind in kinds:
            name, notes = backends.choose(
                backend, kind.device, (kind.grad_dtype, kind.param_dtype), workspace_dtype, kind.shape
            )
            reason = way.refuses(kind)
            ways[kind] = CutRound if reason else way
            if reason and len(holders(kind)) > 1:
                notes += (reason,)
            plan = partial(
                plan_bucket,
                ways[kind].shapes(kind)[0],
                schedule=schedule,
                ns_algorithm=ways[kind].algorithm(ns_algorithm, name),
                backend=name,
                max_workspace_bytes=max_workspace_bytes,
                workspace_dtype=workspace_dtype,
                bytes_per_element=kind.grad_dtype.itemsize + 4 * kind.param_dtype.itemsize,
                stepped=False,
                sign_momentum=sign_momentum,
                between_bytes=4 * scratch_numbers(None, sign_momentum, *kind.shape, kind.device),
            )
            chosen[kind] = plan, notes
        costs, among, dealt = [], [], []
        for kind, entries in kinds.items():
            cost = chosen[kind][0](1).flops
            nearby = [r * team.shard_count + h for r in range(team.replica_count) for h in holders(kind)]
            dealt_to = ways[kind].owners(team)
            for owner, _ in entries:
                costs.append(cost)
                # What only one rank has a part of stays there.
                among.append([owner] if owner is not None else nearby if len(holders(kind)) == 1 else dealt_to)
        owners = iter(deal(costs, team.ranks, among=among))
        number = 0
        for kind, entries in kinds.items():
            by_owner: list[list[Entry]] = [[] for _ in range(team.ranks)]
            for _, entry in entries:
                by_owner[next(owners)].append(entry)
            apart = entries[0][0] is not None
            dealt.append(
                _lot(
                    kind,
                    by_owner,
                    number,
                    schedule,
                    *chosen[kind],
                    max_workspace_bytes,
                    sign_momentum,
                    form,
                    work,
                    apart,
                    ways[kind],
                )
            )
            number += len(entries)
        cap = max((_cap(lot.work.bucket.backend, max_workspace_bytes) for lot in dealt), default=0)
        rounds = _cut_rounds if team.shards else partial(_copy_rounds, share=share_bytes(cap, team.ranks))
        exchanges.append(Exchange(team, rounds(dealt, params, momenta)))
    return exchanges


def _cap(backend: str, max_workspace_bytes: int | None) -> int:
    return backends.get(backend).default_workspace_bytes() if max_workspace_bytes is None else max_workspace_bytes


def _lot(
    kind: Kind,
    entries: list[list[Entry]],
    number: int,
    schedule: Schedule,
    plan: Callable[[int], Bucket],
    notes: tuple[str, ...],
    max_workspace_bytes: int | None,
    sign_momentum: bool,
    form: str | None,
    work: Callable[..., Work],
    kept_apart: bool,
    way: type[CutRound],
) -> Lot:
    owned, most = len(entries[way.owner_here(kind.team)]), max(map(len, entries))
    bucket = plan(owned)
    held, (m, n) = way.shapes(kind)
    in_stack = form if kept_apart else None
    between = scratch_numbers(in_stack, sign_momentum, *held, kind.device)

    def each(m: int, n: int) -> int:
        numbers = scratch_numbers(in_stack, sign_momentum, m, n, kind.device)
        return workspace_bytes(bucket.backend, bucket.algorithm, m, n, schedule) + 4 * numbers

    cap = _cap(bucket.backend, max_workspace_bytes)
    most = in_round(most, bytes_in_flight(each(m, n), m * n, kind.team.replica_count), cap)
    chunks = tuple(min(most, owned - first) for first in range(0, owned, most))
    # Momenta of copies that no rank alone keeps are updated in the workspace, on every rank those of all.
    slots = most if kind.team.shards is None and not kept_apart else max(chunks, default=0)
    bucket = way.counted(replace(bucket, chunks=chunks, slots=slots, workspace_bytes=slots * each(*held)), schedule)
    own = work(bucket, notes, schedule, kind.device, [], form, signs=sign_momentum, between=between)
    return Lot(kind, own, number, entries, most, way, kept_apart)


def _cut_rounds(lots: Sequence[Lot], params: Sequence[Tensor], momenta: Momenta) -> list[CutRound]:
    """Those first in which most ranks have something to do."""
    rounds = [lot.way(lot, i * lot.most, params, momenta) for lot in lots for i in range(lot.rounds)]
    return sorted(rounds, key=lambda r: -sum(len(entries) > r.first for entries in r.lot.entries))


def _copy_rounds(lots: Sequence[Lot], params: Sequence[Tensor], momenta: Momenta, share: int) -> list[CopyRound]:
    """Lots together until a share of their results has so many bytes, which is worth a collective."""
    rounds, waiting = [], []
    for lot in lots:
        for i in range(lot.rounds):
            waiting.append((lot, i * lot.most))
            copies = CopyRound(waiting, params, momenta)
            if copies.share >= share:
                rounds.append(copies)
                waiting = []
    if waiting:
        rounds.append(CopyRound(waiting, params, momenta))
    return rounds
