"""Layout of a group's parameters in a flat buffer, of which every rank has an equal slice.

Parameters follow one another. One that holds several matrices is laid out matrix by matrix, whatever their places in
the parameter are: heads along its columns, interleaved projections. So every matrix is one range of the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...layout import Piece, flattens, split_shape, view
from ...split import pieces
from ..placement import Range

Key = TypeVar("Key")


class Block(NamedTuple):
    """A parameter, or a piece that a split makes of it.

    Attributes:
        param: index of the parameter in its group.
        piece: None for the whole parameter.
        at: its elements in the flat buffer.
    """

    param: int
    piece: Piece | None
    at: Range


class Matrix(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        param: index of the parameter in its group.
        shape: (rows, cols).
        at: its elements in the flat buffer.
    """

    param: int
    shape: tuple[int, int]
    at: Range


def meet(a: Range, b: Range) -> Range:
    """Return the range that `a` and `b` have in common; an empty range if there is none."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (start, start)


def length(at: Range) -> int:
    """Return the number of elements of a range."""
    return at[1] - at[0]


class Flat:
    """Layout of the parameters of a group.

    Attributes:
        elements: number of elements of all parameters.
        starts: where each parameter begins, and where the last one ends.
        layout: for each parameter its size and, of one that is split, how: what decides where its elements are.
        share: elements of the longest slice.
        slices: range of every rank.
        blocks: in order.
        matrices: in order; none of parameters that are stepped element by element.
        needed: for every rank, the range from the beginning of the first to the end of the last matrix of which its
            slice has any.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        ranks: int,
        splits: Sequence[str | None] | None = None,
        flatten: bool | None = None,
    ) -> None:
        """Lay parameters out.

        Args:
            shapes: of the whole parameters.
            ranks: how many share them.
            splits: of each parameter, which is one matrix or several; None where they are stepped element by element.
            flatten: see `Muon`.

        Raises:
            ValueError: a split does not fit its parameter.
        """
        self._flatten = flatten
        self.starts = [0]
        self.layout: list[str] = []
        self.blocks: list[Block] = []
        self.matrices: list[Matrix] = []
        for shape, split in zip(shapes, splits or [None] * len(shapes), strict=True):
            self._add(shape, split, splits is not None)
        self.elements = self.starts[-1]
        # Divided as torch.chunk and DTensor do: the last slice may be shorter or empty.
        self.share = -(-self.elements // ranks)
        self.slices = [
            (min(r * self.share, self.elements), min((r + 1) * self.share, self.elements)) for r in range(ranks)
        ]
        self.needed = []
        for own in self.slices:
            touched = [m.at for m in self.matrices if length(meet(m.at, own))]
            self.needed.append((touched[0][0], touched[-1][1]) if touched else (own[0], own[0]))

    def _add(self, shape: tuple[int, ...], split: str | None, matrices: bool) -> None:
        """Lay out one more parameter."""
        index, start = len(self.layout), self.starts[-1]
        for piece in pieces(shape, self._flatten, split):
            count, rows, cols = split_shape(shape, self._flatten, piece) if matrices else (1, 1, math.prod(shape))
            size = rows * cols
            self.blocks.append(Block(index, piece, (start, start + count * size)))
            if matrices and size:
                ranges = [(start + i * size, start + (i + 1) * size) for i in range(count)]
                self.matrices += [Matrix(index, (rows, cols), at) for at in ranges]
            start += count * size
        self.starts.append(start)
        text = "x".join(map(str, shape)) or "scalar"
        if split is not None:
            text += f" {'flattened ' * flattens(shape, self._flatten)}{split}"
        self.layout.append(text)

    def _elements(self, block: Block, t: Tensor) -> Tensor:
        """Return a view of a block of a parameter's size, whose elements are in the buffer's order."""
        if block.piece is None:
            return t
        return view(t.shape, t.stride(), self._flatten, range(1, t.ndim), block.piece).of(t)

    def fill(self, flat: Tensor, values: Sequence[Tensor | None]) -> None:
        """Write a value of each parameter's size to the buffer, and zeros for None and for what is beyond."""
        for block in self.blocks:
            into, value = flat[slice(*block.at)], values[block.param]
            if value is None:
                into.zero_()
            else:
                elements = self._elements(block, value)
                into.view(elements.shape).copy_(elements)
        flat[self.elements :].zero_()

    def read(self, flat: Tensor, params: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Write the buffer to the parameters that are `present`."""
        for block in self.blocks:
            if present[block.param]:
                elements = self._elements(block, params[block.param])
                elements.copy_(flat[slice(*block.at)].view(elements.shape))

    def slice_of(self, params: Sequence[Tensor], rank: int) -> Tensor:
        """Return a copy, in fp32, of what a rank's slice has of the parameters, of which there is one or more."""
        own = self.slices[rank]
        found = torch.empty(length(own), dtype=torch.float32, device=params[0].device)
        for block in self.blocks:
            begin, end = meet(block.at, own)
            if begin < end:
                elements = self._elements(block, params[block.param]).reshape(-1)
                found[begin - own[0] : end - own[0]].copy_(elements[begin - block.at[0] : end - block.at[0]])
        return found

    def runs(self, rank: int, keys: Sequence[Key | None]) -> list[tuple[slice, Key]]:
        """Return where a rank's slice has parameters of one key, those of equal keys that follow one another together.

        Args:
            rank: the rank.
            keys: of each parameter; None to leave it out.

        Returns:
            (elements of the slice, key), in order.
        """
        own = self.slices[rank]
        found: list[tuple[slice, Key]] = []
        for key, at in zip(keys, zip(self.starts, self.starts[1:], strict=False), strict=True):
            begin, end = meet(at, own)
            if key is None or begin == end:
                continue
            begin, end = begin - own[0], end - own[0]
            if found and found[-1][1] == key and found[-1][0].stop == begin:
                begin = found.pop()[0].start
            found.append((slice(begin, end), key))
        return found


@lru_cache(maxsize=256)
def lay_out(
    shapes: tuple[tuple[int, ...], ...],
    ranks: int,
    splits: tuple[str | None, ...] | None = None,
    flatten: bool | None = None,
) -> Flat:
    """Return the layout of parameters, see `Flat`, made once for all steps."""
    return Flat(shapes, ranks, splits, flatten)
