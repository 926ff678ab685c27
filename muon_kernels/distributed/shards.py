"""Shards of a matrix by rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from torch import Tensor

from ..layout import Layout, Piece, PieceShape, flattens, merged, split_shape, view
from ..split import pieces
from ..stages.packed import pieces_of_shape
from .placement import Placement, Range
from .slices import Rectangle


def _overlap(a: Range, b: Range) -> Range:
    """Return the range that `a` and `b` have in common, counted from the start of `a`; (0, 0) if there is none."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start - a[0], stop - a[0]) if start < stop else (0, 0)


class Shards(NamedTuple):
    """Equal matrices that a parameter or a piece of it is stepped as, and what each rank holds of them.

    Attributes:
        piece: of this rank's shard.
        shape: (batch, rows, cols) of the whole matrices.
        rectangles: of (rows, cols), by rank.
        rows: the rows of which each rank holds elements, be it in another piece.
    """

    piece: Piece | None
    shape: tuple[int, int, int]
    rectangles: tuple[Rectangle, ...]
    rows: tuple[Range, ...]


def shards_of(placement: Placement, flatten: bool | None, split: str | None) -> Iterator[Shards]:
    """Yield, for every piece of a parameter that is stepped as equal matrices, what each rank holds of them.

    Raises:
        ValueError: `split` divides the dimension along which the parameter is sharded into pieces that are not
            contiguous.
    """
    whole, ndim = placement.whole, len(placement.whole)
    row, col = (0, 1) if flattens(whole, flatten) else (ndim - 2, ndim - 1)
    is_cut = [any(shard[dim] != (0, n) for shard in placement.shards) for dim, n in enumerate(whole)]
    own = placement.shards[placement.team.shard]
    dims = {piece.dim for piece in pieces(whole, flatten, split) if piece is not None}
    separate = any(is_cut[dim] for dim in dims)
    for piece in pieces(whole, flatten, split, separate):
        batch, rows, cols = split_shape(whole, flatten, piece)
        here = piece
        if piece is not None and is_cut[piece.dim] and piece.runs != 1:
            raise ValueError(
                f"split={split!r} should cut another dimension than {piece.dim}, along which the parameter of size "
                f"{whole} is sharded, or to parts that are contiguous"
            )
        rectangles, row_ranges = [], []
        for rank, shard in enumerate(placement.shards):
            # The rows and columns of this piece that the rank holds.
            spans = {row: (0, rows), col: (0, cols)}
            for dim in (row, col):
                if not is_cut[dim]:
                    continue
                if piece is not None and piece.dim == dim:
                    at = (piece.start, piece.start + piece.size)
                    spans[dim] = _overlap(at, shard[dim])
                    if rank == placement.team.shard:
                        start, stop = _overlap(own[dim], at)
                        here = Piece(dim, start, 1, stop - start, 1, stop - start)
                elif dim == row or not flattens(whole, flatten):
                    spans[dim] = shard[dim]
            (top, bottom), (left, right) = spans[row], spans[col]
            row_ranges.append(spans[row])
            empty = top == bottom or left == right
            rectangles.append(Rectangle(0, 0, 0, 0) if empty else Rectangle(top, left, bottom - top, right - left))
        yield Shards(here, (batch, rows, cols), tuple(rectangles), tuple(row_ranges))


def pieces_held(t: Tensor, placement: Placement | None, flatten: bool | None, split: str | None) -> list[PieceShape]:
    """Return what this rank holds of every piece of a parameter, a part of it or not, of which `t` is its shard."""
    if placement is None:
        return pieces_of_shape(t.shape, flatten, split)
    own = placement.team.shard
    return [
        (piece, (batch, rectangles[own].rows, rectangles[own].cols))
        for piece, (batch, _, _), rectangles, _ in shards_of(placement, flatten, split)
    ]


def layouts(t: Tensor, flatten: bool | None, piece: Piece | None, batch: int, tall: bool) -> list[Layout]:
    """Return the layout of every matrix of `t`, this rank's shard; transposed where the whole matrix is `tall`.

    Raises:
        ValueError: no strides describe `t` or its `piece`.
    """
    order = tuple(range(1, t.ndim)) if flattens(t.shape, flatten) else ()
    seen = view(t.shape, t.stride(), flatten, order, piece)
    rows, cols = merged(seen.rows), merged(seen.cols)
    if rows is None or cols is None:
        raise ValueError(
            "what several ranks have of a parameter, its gradient or state should be contiguous"
            + ("" if piece is None else ", and divided by a split to parts that strides describe,")
            + f" but one of size {tuple(t.shape)} has strides: {t.stride()}"
            + ("" if piece is None else f", divided to {piece}")
        )
    (m, row_stride), (n, col_stride) = (cols, rows) if tall else (rows, cols)
    places = product(*(range(0, size * stride, stride) if stride else [0] * size for size, stride in seen.batch))
    found = [Layout(1, m, n, seen.offset + sum(place), 0, row_stride, col_stride, tall) for place in places]
    assert len(found) == batch
    return found
