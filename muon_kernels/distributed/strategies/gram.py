"""The strategy "gram": matrices that are sharded along their longer dimension are orthogonalized where they are.

With X = [X_1 ... X_k], one shard a rank, X Xᵀ = Σ X_i X_iᵀ: nothing else in Newton-Schulz needs more than a rank's own
shard. The ranks sum the Gram matrix wherever the iteration visits X, two or three times in the Gram form. They iterate
on it alike and apply the result to their shards. Nobody sends a slice. Megatron-Core's Muon has the same for tensor
parallelism ("distributed").

A sum is of m(m+1)/2 numbers in fp32, one triangle, and takes 4 m² (k-1)/k bytes from every rank for each visit. Owners
take 4 m n (k-1)/k² for a matrix. So this sends less where shards are wider than m times the number of visits: for four
128x16384 matrices on four ranks 0.6 MB a rank instead of 6.3, but for four 256x1024 ones 2.4 MB instead of 0.8. It may
also be of use where matrices are so few that some ranks would own none. Every rank does the m x m products itself.

Partial sums rounded to bf16 would be wrong by Σ 2^-9 |(X_i X_iᵀ)_ab| <= 2^-9 √(R_aa R_bb) in an element of the Gram
matrix R. Where they cancel that is more than the rounding of the sum, and too much for three steps between two visits.
So a second product returns what rounding took from the first, and the sum is exact to 2^-17 √(R_aa R_bb).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from ...coefficients import Schedule
from ...newton_schulz import ALGORITHMS, Products, Square
from ...step.counting import Counter, count_iteration
from ...step.plan import Bucket
from ..collectives import Pending
from ..lots import Kept, Lot, LotKey, holders
from ..placement import Team
from ..slices import NORM_BYTES, Buffers, Rectangle, scale_of, shift_of
from .owner import OwnerRound

if TYPE_CHECKING:
    from ...step.work import Scalars
    from ...step.workspace import Stacks, Workspace


class Summed:
    """A backend's products of matrices of which every rank has some columns; squares are the same on all ranks."""

    def __init__(self, ops: Products, rest: Square, add_up: Callable[[Square, Square, Tensor | None], None]) -> None:
        """Take a backend and what sums its squares.

        Args:
            ops: the backend.
            rest: of the size of all squares, overwritten.
            add_up: replaces its first argument, a square, by the sum of all ranks' scale²·(square + rest).
        """
        self._ops, self._rest, self._add_up = ops, rest, add_up

    def __getattr__(self, name: str) -> Any:
        """Return the backend's own operation, for those that sum over no sharded dimension."""
        return getattr(self._ops, name)

    def syrk(self, A: Tensor | Square, *, out: Square, scale: Tensor | None = None, **rest: Any) -> None:
        """Compute `Products.syrk`; of a sharded matrix only scale²·A·Aᵀ, summed over all ranks."""
        if isinstance(A, Square):
            self._ops.syrk(A, out=out, scale=scale, **rest)
            return
        assert not rest, "every rank would add it"
        if A.numel():
            self._ops.syrk(A, out=out)
            self._ops.syrk(A, C=out, beta=-1.0, out=self._rest)
        else:
            self._ops.then(lambda: _clear(out, self._rest), [out.high, self._rest.high])
        self._ops.then(lambda: self._add_up(out, self._rest, scale), [out.high, self._rest.high])

    def gemm(self, A: Square, X: Tensor | Square, *, out: Tensor | Square, **rest: Any) -> None:
        """Compute `Products.gemm`, or nothing where this rank has no columns."""
        if (out.high if isinstance(out, Square) else out).numel():
            self._ops.gemm(A, X, out=out, **rest)

    def add(self, A: Square, *, out: Square, **rest: Any) -> None:
        """Compute `Products.add`, or nothing where this rank has no columns."""
        if out.high.numel():
            self._ops.add(A, out=out, **rest)


def _clear(*squares: Square) -> None:
    for square in squares:
        square.high.zero_()
        if square.diagonal is not None:
            square.diagonal.zero_()


def packed_size(m: int) -> tuple[int, int]:
    """Return (rows, cols) of a packed m x m matrix."""
    return m + 1 - m % 2, (m + 1) // 2


def _halves(packed: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return views of a packed matrix: its first columns, lower triangle; its last columns transposed, upper triangle.

    The format is LAPACK's rectangular full packed one (Gustavson et al., ACM TOMS 37, 2010).
    """
    rows, h = packed_size(m)
    down = rows - m
    return packed[:, down:], packed[:, : m - h, 1 - down : 1 - down + m - h]


def pack(squares: Sequence[Square], scale: Tensor | None, packed: Tensor) -> None:
    """Write the lower triangle of scale²·Σ squares.

    Args:
        squares: (batch, m, m) each.
        scale: (batch,) fp32; None for 1.
        packed: (batch, *packed_size(m)) fp32, written.
    """
    left, right = _halves(packed, squares[0].high.shape[1])
    h = left.shape[2]
    packed.zero_()
    for square in squares:
        left[:, :h].add_(square.high[:, :h, :h].tril())
        left[:, h:].add_(square.high[:, h:, :h])
        right.add_(square.high[:, h:, h:].mT.triu())
        if square.diagonal is not None:
            left.diagonal(dim1=1, dim2=2).add_(square.diagonal[:, :h])
            right.diagonal(dim1=1, dim2=2).add_(square.diagonal[:, h:])
    if scale is not None:  # whose square may be outside fp32's range
        packed.mul_(scale[:, None, None]).mul_(scale[:, None, None])


def unpack(packed: Tensor, square: Square) -> None:
    """Write to `square` what `pack` packed: exactly symmetric, rounded, with what rounding took from the diagonal."""
    high = square.high
    left, right = _halves(packed, high.shape[1])
    h = left.shape[2]
    high[:, :, :h].copy_(left)
    high[:, h:, h:].copy_(right.mT)
    high.copy_(high.tril() + high.tril(-1).mT)
    if square.diagonal is not None:
        exact = torch.cat([half.diagonal(dim1=1, dim2=2) for half in (left, right)], 1)
        torch.sub(exact, high.diagonal(dim1=1, dim2=2).float(), out=square.diagonal)


class _Visited(Summed):
    """Counter of the products that sum over a sharded dimension."""

    visits = 0

    def syrk(self, A: Tensor | Square, **rest: Any) -> None:
        self.visits += not isinstance(A, Square)
        super().syrk(A, **rest)


@lru_cache(maxsize=256)
def count(backend: str, algorithm: str, m: int, n: int, schedule: Schedule) -> tuple[int, int, int, int]:
    """Return (visits to X, launches, FLOPs, bytes) of the iteration on n columns of an m-row matrix; see plan.py."""
    ops = backends.get(backend)
    counter = Counter(ops.symmetric_products, ops.precise_squares)
    rest = Square(torch.empty(1, m, m, dtype=torch.bfloat16, device="meta"))
    visited = _Visited(counter, rest, lambda *_: None)
    count_iteration(visited, algorithm, m, n, schedule)  # type: ignore[arg-type]
    return visited.visits, counter.launches, counter.flops, counter.bytes


class GramRound(OwnerRound):
    """Round of matrices that stay where they are."""

    @classmethod
    def refuses(cls, key: LotKey) -> str | None:
        """Return why such matrices cannot be summed, or None.

        A rank that holds elements of a matrix should hold whole columns of it, its longer dimension being the columns.
        """
        m, n = key.shape
        if len(holders(key)) > 1 and all(key.shards[rank].rows == m for rank in holders(key)):
            return None
        return (
            f"strategy='gram' is for matrices that are cut along their longer dimension: the parts of {m}x{n} ones, "
            f"which are {' and '.join(sorted({f'{p.rows}x{p.cols}' for p in key.shards}))}, go to owners"
        )

    @classmethod
    def turns(cls, rectangles: Sequence[Rectangle]) -> bool:
        """Whether to transpose square matrices with such shards, so that their columns are sharded."""
        found = [shard for shard in rectangles if shard.elements]
        return all(shard.left == 0 and shard.cols == found[0].cols for shard in found)

    @classmethod
    def owners(cls, team: Team) -> list[int]:
        """Return the first rank of each replica, which stands for all ranks of it."""
        return [replica * team.shard_count for replica in range(team.replica_count)]

    @classmethod
    def owner_here(cls, team: Team) -> int:
        """Return the rank whose matrices this one iterates: the first of this replica."""
        return team.replica * team.shard_count

    @classmethod
    def shapes(cls, key: LotKey) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (m, columns of this rank's shard) and (m, columns of the widest shard)."""
        m, own = key.shape[0], key.shards[key.team.shard].cols
        return (m, own), (m, max(shard.cols for shard in key.shards))

    @classmethod
    def algorithm(cls, name: str, backend: str) -> str:
        """Return the form of the iteration, the same on all ranks.

        "auto" takes the form that visits X as seldom as the backend's accuracy allows, whatever the shapes of the
        shards.
        """
        if name != "auto":
            return name
        return "gram" if backends.get(backend).precise_squares else "standard"

    @classmethod
    def counted(cls, bucket: Bucket, schedule: Schedule) -> Bucket:
        """Return the bucket with the launches, FLOPs and bytes of the iteration on shards."""
        _, launches, flops, bytes_ = count(bucket.backend, bucket.algorithm, *bucket.shape, schedule)
        ops = backends.get(bucket.backend)
        return replace(
            bucket,
            launches=sum(launches + ops.update_launches(chunk) for chunk in bucket.chunks),
            flops=bucket.count * flops,
            product_bytes=bucket.count * bytes_,
        )

    def __init__(self, lot: Lot, start: int, kept: Kept) -> None:
        """Decide what is summed in a round; see `OwnerRound`."""
        super().__init__(lot, start, kept)
        bucket = lot.work.bucket
        self.count = len(self.entries[lot.key.team.replica])
        self._packed = (self.count, *packed_size(lot.key.shape[0]))
        self.visits = count(bucket.backend, bucket.algorithm, *bucket.shape, lot.work.schedule)[0]
        self._program: tuple[Stacks, Buffers, Callable[[], Tensor]] | None = None

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """Bytes of `Buffers.slices`, this rank's shards, and of `Buffers.owned`, sums of squares."""
        m = self.lot.key.shape[0]
        squares = self._sum_bytes + self.count * m * (4 + self.lot.work.bucket.workspace_dtype.itemsize * m)
        return self.share * self.sent[0].record, squares + -squares % NORM_BYTES  # buffers are of doubles

    @property
    def _sum_bytes(self) -> int:
        return math.prod(self._packed) * torch.float32.itemsize

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others if a sum is reduced and then gathered, as in a ring."""
        ranks = self.lot.key.team.shard_count
        sums = [self.count * torch.float64.itemsize] + self.visits * [self._sum_bytes]
        return sum(2 * (ranks - 1) * size // ranks for size in sums) + self.sent_to_replicas

    @property
    def collectives(self) -> int:
        """Number of collectives in a round."""
        return 1 + self.visits + len(self.parts)

    def begin(self, grads: Sequence[Tensor], scalars: Scalars, buffers: Buffers) -> None:
        """Update momenta and begin to sum the squares of norms."""
        own = buffers.norms[: self.count]
        own.zero_()  # where this rank has nothing
        self.update_momenta(grads, scalars, buffers)
        self._own = own.clone()
        self._squares = own.square()
        self.pending = self._sum(self._squares, "norms") if self.count else None

    def _sum(self, numbers: Tensor, what: str) -> Pending:
        return Pending(
            f"summing {what} of {self.lot}",
            self.lot.key.team.shards,
            lambda: dist.all_reduce(numbers, group=self.lot.key.team.shards, async_op=True),
        )

    def iterate(self, scalars: Scalars, workspace: Workspace, buffers: Buffers) -> None:
        """Orthogonalize the matrices together with the other ranks of the shards."""
        if self.pending is None:
            return
        self.pending.wait()
        self.pending = None
        work, ops = self.lot.work, backends.get(self.lot.work.bucket.backend)
        stacks = workspace.stacks(work, self.count)
        own, norms = self._own, self._squares.sqrt_()
        slices = self.sent[0]._replace(matrices=self.count).of(buffers.slices, work.bucket.workspace_dtype)
        X = stacks.X[:, : slices.shape[1]]  # nothing, where this rank has none
        if stacks.blend is not None:
            stacks.blend.norms.copy_(norms)
        X.copy_(slices)
        scale = stacks.derived.setdefault("scale", torch.empty(self.count, dtype=torch.float32, device=X.device))
        if ops.normalizes:
            scale.copy_((own / norms).where(norms != 0, 0.0))
        else:
            scale.copy_(scale_of(norms, shift_of(own, X.dtype), scalars.eps, work.schedule.margin))
        slices.copy_(self._together(stacks, scale, buffers)()[:, : slices.shape[1]])

    def _together(self, stacks: Stacks, scale: Tensor, buffers: Buffers) -> Callable[[], Tensor]:
        """Return the program of the iteration, with sums over ranks where its products need them."""
        if self._program is None or self._program[0] is not stacks or self._program[1] is not buffers:
            work = self.lot.work
            ops, m = backends.get(work.bucket.backend), self.lot.key.shape[0]
            offset = 0

            def take(dtype: torch.dtype, *size: int) -> Tensor:
                nonlocal offset
                begin, offset = offset, offset + math.prod(size) * dtype.itemsize
                return buffers.owned[begin:offset].view(dtype).view(size)

            packed = take(torch.float32, *self._packed)
            diagonal = take(torch.float32, self.count, m) if ops.precise_squares else None
            rest = Square(take(work.bucket.workspace_dtype, self.count, m, m), diagonal)

            def add_up(square: Square, rest: Square, scale: Tensor | None) -> None:
                pack([square, rest], scale, packed)
                self._sum(packed, "squares").wait()
                unpack(packed, square)

            summed, algorithm = Summed(ops, rest, add_up), ALGORITHMS[work.bucket.algorithm]
            X, Y, squares, blend, *_ = stacks
            program = ops.program(lambda: algorithm.run(summed, X, Y, squares, scale, work.schedule, blend))
            self._program = stacks, buffers, program
        return self._program[2]
