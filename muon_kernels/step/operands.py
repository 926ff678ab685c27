"""Operands of a step: what belongs to one parameter, and how strides see it as matrices."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..layout import (
    Layout,
    Matrices,
    Piece,
    PieceShape,
    View,
    Window,
    column_order,
    flattens,
    layout,
    split_shape,
    view,
)
from ..scaling import lr_ratio
from ..split import pieces
from ..stages.packed import check_mantissa, check_master, check_momentum_scale, pieces_of_shape, scales_of
from ..stages.second_moment import check_second_moment, piece_of_rows
from ..tensors import check_dense, check_device, check_disjoint, check_like, check_momentum
from .numbers import NUMBERS
from .options import StepOptions, check_rounding
from .work import Span


class BucketKey(NamedTuple):
    """Properties that the matrices of a bucket have in common.

    Attributes:
        window: where they are in whole ones, if that matters.
    """

    rows: int
    cols: int
    device: torch.device
    grad_dtype: torch.dtype
    momentum_dtype: torch.dtype
    param_dtype: torch.dtype
    window: Window = Window()


class Operand(NamedTuple):
    """One parameter of a step and what belongs to it; of a DTensor, this rank's part.

    Attributes:
        momentum: None where the direction is the gradient, or where another rank keeps it.
        momentum_scale: the absmax of an int8 momentum, see packed.py.
        mantissa: with `master_weights`, the lower half of the parameter.
        second_moment: with `second_moment`; None where another rank keeps it.
        split: what the parameter is cut to, see `muon_kernels.split`.
        transposed: whether it is stored as (inputs, outputs), see `Muon`.
        pieces: what of it is stepped as matrices; None: what `split` says.
        lr_factor: a factor of the learning rate beside that of the shape.
        whole: size of the parameter of which this is a shard; None for the tensor's own.
        momentum_dtype: what a new momentum would be of, which all ranks know; None where the direction is the gradient.
        first_part: index of the first of `pieces` among the parts that `split` makes of a matrix.
        windows: with stochastic rounding, of each of `pieces`; None where these are whole matrices.
        numbers: with stochastic rounding, of every matrix that is here the number of its first part; see numbers.py.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor | None = None
    momentum_scale: Tensor | None = None
    mantissa: Tensor | None = None
    second_moment: Tensor | None = None
    split: str | None = None
    transposed: bool = False
    pieces: Sequence[PieceShape] | None = None
    lr_factor: float = 1.0
    whole: tuple[int, ...] | None = None
    momentum_dtype: torch.dtype | None = None
    first_part: int = 0
    windows: Sequence[Window] | None = None
    numbers: Sequence[int] = ()

    def lr_ratio(self, options: StepOptions, rows: int, cols: int) -> float:
        """Factor of the learning rate for a matrix of this size."""
        shape = (cols, rows) if self.transposed else (rows, cols)
        return lr_ratio(options.adjust_lr_fn, *shape) * self.lr_factor

    def pieces_in_blocks(self, flatten: bool | None) -> Sequence[PieceShape]:
        """Return the pieces in whose order an int8 momentum has its absmax."""
        return pieces_of_shape(self.param.shape, flatten, self.split) if self.pieces is None else self.pieces

    def part_numbers(self, piece: Piece | None, before: int) -> array[int]:
        """Return the numbers of the matrices of a piece, none if nobody has given any; `before`: parts before it."""
        parts = 1 if piece is None else piece.parts
        return array("i", [(number + before + i) % NUMBERS for number in self.numbers for i in range(parts)])

    def bucket_key(self, rows: int, cols: int) -> BucketKey:
        """The bucket that a matrix of this size goes to."""
        p, g, momentum = self.param, self.grad, self.momentum
        momentum_dtype = g.dtype if momentum is None else momentum.dtype
        return BucketKey(min(rows, cols), max(rows, cols), p.device, g.dtype, momentum_dtype, p.dtype)


class Source(NamedTuple):
    """A tensor that strides describe, or a piece of it, and how."""

    tensor: Tensor
    flatten: bool | None
    order: tuple[int, ...]
    piece: Piece | None

    def layout(self, span: Span) -> Layout:
        """Return where the matrices of a span lie."""
        t, flatten, order, piece = self
        at = layout(t.shape, t.stride(), flatten, order, piece, span.start, span.stop)
        assert at is not None
        return at

    def untransposed(self, span: Span) -> Tensor:
        """Return (matrices, rows, cols) as the parameter has them, sharing its memory."""
        at = self.layout(span)
        seen = Matrices(self.tensor, at).view()
        return seen.mT if at.transposed else seen


def source_of(
    t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None = None
) -> tuple[Source, View | None]:
    """View `t` as matrices. Where no strides can, return an empty copy, and the view of `t` to fill it from.

    Strides do not tell of a negation that torch has put off, as in `z.conj().imag`.
    """
    if layout(t.shape, t.stride(), flatten, order, piece) is not None and not t.is_neg():
        return Source(t, flatten, order, piece), None
    at = view(t.shape, t.stride(), flatten, order, piece)
    sizes = [math.prod(n for n, _ in dims) for dims in (at.batch, at.rows, at.cols)]
    return Source(torch.empty(sizes, dtype=t.dtype, device=t.device), False, (), None), at


def pieces_of(p: Tensor, flatten: bool | None, order: tuple[int, ...], split: str | None) -> tuple[Piece | None, ...]:
    """Return the pieces to cut a parameter to. Equal parts are one piece, unless separate ones save copies."""
    if split is None:
        return (None,)
    together, separate = (pieces(p.shape, flatten, split, separate) for separate in (False, True))

    def described(found: Sequence[Piece | None]) -> bool:
        return all(layout(p.shape, p.stride(), flatten, order, piece) is not None for piece in found)

    return separate if described(separate) and not described(together) else together


class Seen(NamedTuple):
    """Piece of an operand, seen as equal matrices.

    Attributes:
        key: of the bucket that they go to.
        matrices: their number.
        ratio: of their learning rate.
        gradient: index of what `grad` sees among the gradients, those that are copied counted after all others.
        absmax: of an int8 momentum.
        mantissa: lower half of the parameter.
        second_moment: of this piece.
        numbers: of the matrices; none without stochastic rounding.
    """

    key: BucketKey
    matrices: int
    ratio: float
    param: Source
    momentum: Source | None
    grad: Source
    gradient: int
    absmax: Tensor | None
    mantissa: Source | None
    second_moment: Source | None
    numbers: array[int]


def check(operands: Sequence[Operand], options: StepOptions) -> None:
    """Raise ValueError or TypeError unless all of them can be stepped."""
    for operand in operands:
        p, V, mantissa = operand.param, operand.second_moment, operand.mantissa
        if V is not None:
            form = cast(str, options.second_moment)
            check_second_moment("second_momentum_buffer", V, form, p, options.flatten, operand.split, operand.whole)
            check_device("second_momentum_buffer", V, p)
        if options.master_weights:
            check_master(p)
            check_mantissa("mantissa", mantissa, p)
            check_device("mantissa", cast(Tensor, mantissa), p)
    for operand in operands:
        p, g = operand.param, operand.grad
        check_dense("gradient", g)
        check_like("gradient", g, p)
        check_device("gradient", g, p)
        if operand.momentum is not None:
            check_momentum(operand.momentum, p)
        if options.stochastic_rounding:
            check_rounding(p)
    fields = {
        "parameter": "param",
        "momentum_buffer": "momentum",
        "second_momentum_buffer": "second_moment",
        "momentum_scale": "momentum_scale",
        "mantissa": "mantissa",
    }
    named = [(name, getattr(operand, field)) for name, field in fields.items() for operand in operands]
    check_disjoint([(name, t) for name, t in named if isinstance(t, Tensor)])


def piece_shapes(operand: Operand, options: StepOptions) -> tuple[tuple[int, ...], Sequence[PieceShape]]:
    """Return the order of the columns of an operand, see `layout`, and its pieces.

    Raises:
        ValueError, TypeError: its momentum is of int8 and cannot be.
    """
    p, flatten = operand.param, options.flatten
    order = column_order(p.shape, p.stride()) if flattens(p.shape, flatten) else ()
    if operand.momentum is not None and operand.momentum.dtype == torch.int8:
        if options.power == 1:
            raise ValueError(
                "momentum_buffer should be floating-point where power is 1, which is SGD in torch, but is of int8; "
                "delete it from the state to start anew"
            )
        check_momentum_scale("momentum_scale", operand.momentum_scale, operand.pieces_in_blocks(flatten))
        check_device("momentum_scale", cast(Tensor, operand.momentum_scale), p)
        if order:  # blocks are along rows as everybody sees them, whatever the strides
            order = tuple(range(1, p.ndim))
    if operand.pieces is not None:
        return order, operand.pieces
    return order, [
        (piece, split_shape(p.shape, flatten, piece)) for piece in pieces_of(p, flatten, order, operand.split)
    ]


class Viewer:
    """Sees operands as matrices.

    Attributes:
        copies: (parameter or state, its copy) where no strides describe matrices; see `Prepared`.
        grad_copies: (index of a gradient, the piece of it, its copy), likewise.
    """

    def __init__(self, options: StepOptions, gradients: int) -> None:
        """`gradients`: how many there are; copies count as further ones."""
        self._options, self._gradients = options, gradients
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.grad_copies: list[tuple[int, View, Tensor]] = []

    def seen(self, index: int, operand: Operand) -> Iterator[Seen]:
        """Yield every piece of an operand, whose gradient has this index."""
        order, shapes = piece_shapes(operand, self._options)
        p, g, momentum, flatten = operand.param, operand.grad, operand.momentum, self._options.flatten
        absmaxes: list[Tensor | None] = [None] * len(shapes)
        if momentum is not None and momentum.dtype == torch.int8:
            scale = cast(Tensor, operand.momentum_scale)
            absmaxes = list(scales_of(scale, operand.pieces_in_blocks(flatten), len(shapes)))
        windows = operand.windows or [Window()] * len(shapes)
        parts = [1 if piece is None else piece.parts for piece, _ in shapes]
        befores = list(accumulate(parts, initial=operand.first_part))[:-1]
        moments = self._second_moments(operand, order, [piece for piece, _ in shapes], befores)
        for (piece, (count, rows, cols)), before, window, absmax, moment in zip(
            shapes, befores, windows, absmaxes, moments, strict=True
        ):
            grad, at = source_of(g, flatten, order, piece)
            gradient = index
            if at is not None:
                gradient = self._gradients + len(self.grad_copies)
                self.grad_copies.append((index, at, grad.tensor.view_as(at.of(g))))
            yield Seen(
                operand.bucket_key(rows, cols)._replace(window=window),
                count,
                operand.lr_ratio(self._options, rows, cols),
                self._written(p, flatten, order, piece),
                None if momentum is None else self._written(momentum, flatten, order, piece),
                grad,
                gradient,
                absmax,
                None if operand.mantissa is None else self._written(operand.mantissa, flatten, order, piece),
                moment,
                operand.part_numbers(piece, before),
            )

    def _second_moments(
        self, operand: Operand, order: tuple[int, ...], split_into: Sequence[Piece | None], befores: Sequence[int]
    ) -> Iterator[Source | None]:
        V = operand.second_moment
        for piece, before in zip(split_into, befores, strict=True):
            if V is None:
                yield None
            elif self._options.second_moment == "element":
                yield self._written(V, self._options.flatten, order, piece)
            else:
                at_rows = piece_of_rows(V, operand.param.shape, self._options.flatten, piece, before)
                yield self._written(V, False, (), at_rows)

    def _written(self, t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None) -> Source:
        """Return `source_of` a tensor that a step writes; a copy is filled before the step and read after it."""
        source, at = source_of(t, flatten, order, piece)
        if at is not None:
            self.copies.append((at.of(t), source.tensor.view_as(at.of(t))))
        return source
