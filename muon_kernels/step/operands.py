"""How the strides of parameters, gradients and state are seen as matrices, and what must be copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import Layout, Matrices, Piece, View, layout, view
from ..split import pieces
from ..tensors import check_dense, check_device, check_like, check_momentum
from .work import Part


class Source(NamedTuple):
    """A tensor that strides describe, or a piece of it, and how."""

    tensor: Tensor
    flatten: bool | None
    order: tuple[int, ...]
    piece: Piece | None

    def layout(self, part: Part) -> Layout:
        """Return where the matrices of a part lie."""
        t, flatten, order, piece = self
        at = layout(t.shape, t.stride(), flatten, order, piece, part.start, part.stop)
        assert at is not None
        return at

    def untransposed(self, part: Part) -> Tensor:
        """(matrices, rows, cols) as the parameter has them, sharing its memory."""
        at = self.layout(part)
        seen = Matrices(self.tensor, at).view()
        return seen.mT if at.transposed else seen


def source_of(
    t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None = None
) -> tuple[Source, View | None]:
    """How to see `t` as matrices; where no strides do, an empty copy, and the view of `t` to fill it from.

    Strides do not tell of a negation that torch has put off, as in `z.conj().imag`.
    """
    if layout(t.shape, t.stride(), flatten, order, piece) is not None and not t.is_neg():
        return Source(t, flatten, order, piece), None
    at = view(t.shape, t.stride(), flatten, order, piece)
    sizes = [math.prod(n for n, _ in dims) for dims in (at.batch, at.rows, at.cols)]
    return Source(torch.empty(sizes, dtype=t.dtype, device=t.device), False, (), None), at


def seen_as(
    t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None, copies: list[tuple[Tensor, Tensor]]
) -> Source:
    """`source_of` of what a step writes; a copy goes to the list of those to fill before it and to read after it."""
    source, at = source_of(t, flatten, order, piece)
    if at is not None:
        copies.append((at.of(t), source.tensor.view_as(at.of(t))))
    return source


def pieces_of(p: Tensor, flatten: bool | None, order: tuple[int, ...], split: str | None) -> tuple[Piece | None, ...]:
    """What to cut a parameter to; equal parts together, unless apart saves copies."""
    if split is None:
        return (None,)
    together, apart = (pieces(p.shape, flatten, split, apart) for apart in (False, True))

    def described(cut: Sequence[Piece | None]) -> bool:
        return all(layout(p.shape, p.stride(), flatten, order, piece) is not None for piece in cut)

    return apart if described(apart) and not described(together) else together


def check_operands(p: Tensor, g: Tensor, buffer: Tensor | None) -> None:
    """Raise ValueError or TypeError unless a gradient and a momentum can be those of `p`."""
    check_dense("gradient", g)
    check_like("gradient", g, p)
    check_device("gradient", g, p)
    if buffer is not None:
        check_momentum(buffer, p)
