"""The second moments of NorMuon and AdaMuon where ranks hold shards of a matrix; see stages/second_moment.py.

Every rank keeps those of its own shard; "neuron", which has one for each row, those of all rows that it has any of.
Where ranks hold whole rows, they exchange sums of rows, and add these in the order of one process: the result is the
same to the bit. The sums over a row that is cut, and over a matrix for "element", are of partial sums. They are added
in another order, so the result is the same to fp32's rounding.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import Matrices, Piece
from ..stages.second_moment import Whole, piece_of_rows, shape_of, shape_of_shard
from ..stages.sums import norm_kept
from .collectives import doing
from .placement import Range, dim_of
from .shards import layouts

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def create(form: str, p: DTensor, flatten: bool | None, split: str | None) -> DTensor:
    """Return V of a DTensor that has not been stepped: zeros in fp32, sharded along rows as the parameter is."""
    if form == "element":
        return cast("DTensor", torch.zeros_like(p, dtype=torch.float32))
    module = sys.modules["torch.distributed.tensor"]  # p is from it
    last, shape = p.ndim - 1, shape_of(form, p.shape, flatten, split)
    rows_cut = [
        module.Replicate() if placement.is_replicate() or dim_of(placement, p.shape) == last else placement
        for placement in p.placements
    ]
    size = shape_of_shard(form, p._local_tensor.shape, p.shape, flatten, split)
    own = torch.zeros(size, device=p.device, dtype=torch.float32)
    stride = torch.empty(shape, device="meta").stride()
    made: DTensor = module.DTensor.from_local(own, p.device_mesh, rows_cut, run_check=False, shape=shape, stride=stride)
    return made


def views(
    form: str, V: Tensor, p: Tensor, flatten: bool | None, piece: Piece | None, before: int, batch: int, tall: bool
) -> list[Tensor]:
    """Return V of every matrix of a piece of this rank's shard, as `by_row` and `by_element` take it.

    Args:
        form: of `FORMS`.
        V, p: this rank's shards of the second moment and of the parameter.
        flatten: the option.
        piece: of `p`.
        before: number of parts in the pieces before.
        batch: number of matrices.
        tall: whether the parameter holds them transposed.
    """
    if form == "element":
        return [Matrices(V, at).view() for at in layouts(V, flatten, piece, batch, tall)]
    at_rows = piece_of_rows(V, p.shape, flatten, piece, before)
    return [Matrices(V, at).view() for at in layouts(V, False, at_rows, batch, tall)]


class RowsHeld(NamedTuple):
    """Rows of the parameter that each rank has any of.

    Attributes:
        tall: whether they are columns of the matrix that is no taller than wide.
        ranges: by rank.
    """

    tall: bool
    ranges: tuple[Range, ...]


class Parts(Whole):
    """Sums over matrices of which the ranks of a group have parts. All have to ask, one that has no part as well."""

    def __init__(
        self, group: dist.ProcessGroup, held: RowsHeld | None, rank: int, height: int, width: int, of: str
    ) -> None:
        """Take what matrices have in common.

        Args:
            group: the ranks that have the parts.
            held: their rows, for `by_row`.
            rank: of this process in it.
            height, width: rows and columns of the whole matrix, as the parameter has it.
            of: names the matrices in an error.
        """
        self._of = of
        self._group, self._height, self._width = group, height, width
        if held is not None:
            ranges, own = held.ranges, held.ranges[rank]
            there = [rows for rows in ranges if rows[0] < rows[1]]
            self._own = slice(*own)
            self._cut_across = len(set(there)) < len(there)  # several ranks have parts of one row
            self._cut_along = any(rows != (0, height) for rows in there)

    def _sum(self, squares: Tensor) -> None:
        with doing(f"summing second moments of {self._of}", self._group):
            dist.all_reduce(squares, group=self._group)

    def columns(self, here: int) -> int:
        """Implement `Whole.columns`."""
        return self._width

    def complete(self, squares: Tensor) -> None:
        """Implement `Whole.complete`: add the sums of the parts of a row."""
        if self._cut_across:
            of_all = squares.new_zeros(len(squares), self._height)
            of_all[:, self._own] = squares.flatten(1)
            self._sum(of_all)
            squares.copy_(of_all[:, self._own].view(squares.shape))

    def kept_by_rows(self, squares: Tensor, factor: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Implement `Whole.kept_by_rows`: gather the sums of all rows, and add them as one process does."""
        if not self._cut_along:
            return super().kept_by_rows(squares, factor, before, after)
        both = squares.new_zeros(2, len(squares), self._height)
        both[0, :, self._own] = squares.flatten(1)
        both[1, :, self._own] = squares.mul_(factor).mul_(factor).flatten(1)
        # Where several ranks have a row, each says the same of it: both sums are then so many times as large.
        self._sum(both)
        for rows, out in zip(both, (before, after), strict=True):
            torch.sum(rows[:, :, None], (1, 2), keepdim=True, out=out)
        return norm_kept(before, after)

    def add_up(self, before: Tensor, after: Tensor) -> None:
        """Implement `Whole.add_up`."""
        both = torch.stack([before, after])
        self._sum(both)
        before.copy_(both[0])
        after.copy_(both[1])
