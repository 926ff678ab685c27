"""Layout of parameters in memory as batches of wide matrices, described without making a single view."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Size, Tensor


class Layout(NamedTuple):
    """Layout of `batch` matrices of `rows` x `cols` (rows <= cols), in elements relative to a tensor's first one.

    A matrix that is taller than wide is described transposed: NS(Xᵀ) = NS(X)ᵀ, so its orientation is only a pair of
    strides.
    """

    batch: int
    rows: int
    cols: int
    offset: int
    batch_stride: int
    row_stride: int
    col_stride: int
    transposed: bool


class Matrices(NamedTuple):
    """Some or all matrices of one tensor."""

    tensor: Tensor
    layout: Layout

    def view(self) -> Tensor:
        """Return the matrices as (batch, rows, cols), sharing the tensor's memory."""
        t, at = self
        return t.as_strided(
            (at.batch, at.rows, at.cols),
            (at.batch_stride, at.row_stride, at.col_stride),
            t.storage_offset() + at.offset,
        )


class Bundle(list[Matrices]):
    """Matrices that stay where they are from step to step. A backend may keep in `derived` what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.derived: dict[str, Any] = {}


class Window(NamedTuple):
    """Place of matrices in whole ones, of which they are parts, rows <= cols; see csrc's Window.

    Attributes:
        top, left: row and column of the first element in the whole matrix.
        cols: columns of the whole matrix; None where it has no others.
        turned: whether the rows of the part are columns of the whole.
    """

    top: int = 0
    left: int = 0
    cols: int | None = None
    turned: bool = False


class Piece(NamedTuple):
    """Equal parts of a dimension of a tensor.

    Part i has the indices start + i·size + run·period + (0 ... size - 1) of dimension `dim`, for each of `runs` runs.
    """

    dim: int
    start: int
    parts: int
    size: int
    runs: int
    period: int


# A piece of a parameter, or None for all of it, and (number of matrices, rows, cols).
PieceShape = tuple[Piece | None, tuple[int, int, int]]


def refs(matrices: Sequence[Matrices]) -> array[int]:
    """Return the addresses and strides of all matrices as kernels read them: csrc's MatrixRef[]."""
    if isinstance(matrices, Bundle) and "refs" in matrices.derived:
        return cast("array[int]", matrices.derived["refs"])
    numbers: list[int] = []
    size = matrices[0].tensor.element_size()
    for tensor, (batch, _, _, offset, batch_stride, row_stride, col_stride, _) in matrices:
        first = tensor.data_ptr() + offset * size
        if batch == 1:  # worth a shorter way, for the gradients of many small parameters
            numbers += first, row_stride, col_stride
            continue
        for i in range(batch):
            numbers += first + i * batch_stride * size, row_stride, col_stride
    made = array("q", numbers)
    if isinstance(matrices, Bundle):
        matrices.derived["refs"] = made
    return made


def flattens(shape: Sequence[int], flatten: bool | None) -> bool:
    """Whether a parameter of this shape is one matrix of (first dimension, all others), as convolutions are.

    `flatten` is the user's option. None flattens from four dimensions on and takes three as a batch of matrices.
    """
    return len(shape) > 2 and (len(shape) > 3 if flatten is None else flatten)


def split_shape(shape: Sequence[int], flatten: bool | None, piece: Piece | None = None) -> tuple[int, int, int]:
    """Return (batch, rows, cols) of a parameter or of a piece of it.

    Leading dimensions count matrices, unless the parameter is flattened.
    """
    if piece is not None:
        before, after = shape[: piece.dim], shape[piece.dim + 1 :]
        batch, rows, cols = split_shape((*before, piece.size * piece.runs, *after), flatten)
        return batch * piece.parts, rows, cols
    if flattens(shape, flatten):
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def merged(dims: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the one (size, stride) that walks `dims` in order, or None if no single stride does."""
    if len(dims) == 1:
        return dims[0]
    size, stride = 1, 1
    for n, s in reversed([d for d in dims if d[0] != 1]):
        if size == 1:
            size, stride = n, s
        elif s != size * stride:
            return None
        else:
            size *= n
    return size, stride


@lru_cache(maxsize=65536)
def column_order(shape: Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order in memory of dimensions 1.. of a flattened parameter, outermost first.

    NS(XP) = NS(X)P for every permutation P, so the order of the columns is free as long as gradient, momentum and
    parameter share it: a channels-last convolution needs no copy.
    """
    return tuple(sorted(range(1, len(shape)), key=lambda d: (-stride[d], d)))


Dims = list[tuple[int, int]]  # (size, stride), outermost first


class View(NamedTuple):
    """View of a tensor, or of a piece of it: its dimensions of matrices, of rows and of columns; offset in elements."""

    batch: Dims
    rows: Dims
    cols: Dims
    offset: int

    def of(self, t: Tensor) -> Tensor:
        """Return `t` with every dimension by itself, sharing its memory."""
        sizes, strides = zip(*self.batch, *self.rows, *self.cols, strict=True)
        return t.as_strided(sizes, strides, t.storage_offset() + self.offset)


def view(
    shape: Sequence[int],
    stride: Sequence[int],
    flatten: bool | None,
    order: Sequence[int],
    piece: Piece | None = None,
) -> View:
    """Return a view of a parameter, or of a piece of it, as matrices. Always possible, unlike `layout`."""
    dims = [[dim] for dim in zip(shape, stride, strict=True)]
    parts: Dims = []
    offset = 0
    if piece is not None:
        step = stride[piece.dim]
        dims[piece.dim] = [(piece.size, step)]
        if piece.runs != 1:
            dims[piece.dim].insert(0, (piece.runs, piece.period * step))
        parts, offset = [(piece.parts, piece.size * step)], piece.start * step
    if flattens(shape, flatten):
        return View(parts, dims[0], [dim for d in order for dim in dims[d]], offset)
    leading = [dim for at in dims[:-2] for dim in at]
    return View([*leading, *parts], dims[-2], dims[-1], offset)


@lru_cache(maxsize=65536)
def layout(
    shape: Size,
    stride: tuple[int, ...],
    flatten: bool | None,
    order: tuple[int, ...],
    piece: Piece | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Layout | None:
    """Return the layout of matrices start..stop of a tensor or of a piece of it.

    Returns None if no strides describe it, so that it has to be copied.
    """
    at = view(shape, stride, flatten, order, piece)
    each = merged(at.batch), merged(at.rows), merged(at.cols)
    if None in each:
        return None
    (batch, batch_stride), (rows, row_stride), (cols, col_stride) = cast("tuple[tuple[int, int], ...]", each)
    if rows > cols:
        rows, cols, row_stride, col_stride, transposed = cols, rows, col_stride, row_stride, True
    else:
        transposed = False
    stop = batch if stop is None else stop
    offset = at.offset + start * batch_stride
    return Layout(stop - start, rows, cols, offset, batch_stride, row_stride, col_stride, transposed)


@lru_cache(maxsize=65536)
def overlaps_itself(shape: Size, stride: tuple[int, ...]) -> bool:
    """Whether two elements of a tensor of this shape and these strides share memory."""
    dims = sorted((s, n) for n, s in zip(shape, stride, strict=True) if n > 1)
    if 0 in shape or not dims:
        return False
    if dims[0][0] == 0:
        return True
    span, nested = 1, True
    for s, n in dims:
        nested = nested and s >= span
        span += s * (n - 1)
    if nested:
        return False
    # Strides that do not nest may still give every element its own memory, as (2, 3) do for size (3, 2).
    seen = torch.zeros(span, dtype=torch.bool, device="cpu")
    seen.as_strided(shape, stride).fill_(True)
    return int(seen.sum()) < math.prod(shape)


def _end(t: Tensor) -> int:
    """Return the address of the first byte after the last element."""
    return t.data_ptr() + t.itemsize * (1 + sum(s * (n - 1) for n, s in zip(t.shape, t.stride(), strict=True)))


def overlapping(tensors: Iterable[Tensor]) -> Tensor | None:
    """Return one of `tensors` that shares an element's memory with another, or None. None of them may overlap itself.

    Slices that interleave, as blocks of columns of one matrix do, share no element.
    """
    clusters: list[list[Tensor]] = []  # tensors that may overlap: their ranges of addresses do
    stop = 0
    there = (t for t in tensors if t.numel() and not t.is_meta)
    for t in sorted(there, key=lambda t: (str(t.device), t.data_ptr())):
        if not clusters or t.device != clusters[-1][0].device or t.data_ptr() >= stop:
            clusters.append([])
            stop = 0
        clusters[-1].append(t)
        stop = max(stop, _end(t))
    for cluster in clusters:
        if len(cluster) == 1:
            continue
        first = cluster[0].data_ptr()
        unit = math.gcd(*(n for t in cluster for n in (t.itemsize, t.data_ptr() - first)))
        taken = torch.zeros((max(map(_end, cluster)) - first) // unit, dtype=torch.bool, device="cpu")
        for t in cluster:
            units = t.itemsize // unit
            strides = (*(s * units for s in t.stride()), 1)
            own = taken.as_strided((*t.shape, units), strides, (t.data_ptr() - first) // unit)
            if own.any():
                return t
            own.fill_(True)
    return None
