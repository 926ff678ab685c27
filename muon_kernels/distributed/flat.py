"""Layout of a group's parameters in a flat buffer, one after the other, of which every rank has an equal slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..layout import split_shape
from .placement import Range


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
    """Layout of the parameters of a group, one after the other.

    Attributes:
        elements: number of elements of all parameters.
        starts: where each parameter begins, and where the last one ends.
        share: elements of the longest slice.
        slices: range of every rank.
        matrices: in order.
        needed: for every rank, the range from the beginning of the first to the end of the last matrix of which its
            slice has any.
    """

    def __init__(self, params: Sequence[Tensor], flatten: bool | None, ranks: int) -> None:
        """Lay the parameters out.

        Args:
            params: whole.
            flatten: see `Muon`.
            ranks: how many share them.
        """
        self.matrices: list[Matrix] = []
        self.starts = [0]
        for index, p in enumerate(params):
            count, rows, cols = split_shape(tuple(p.shape), flatten)
            size = rows * cols
            first = self.starts[-1]
            self.matrices += [
                Matrix(index, (rows, cols), (first + i * size, first + (i + 1) * size))
                for i in range(count * (size > 0))
            ]
            self.starts.append(first + p.numel())
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

    def fill(self, flat: Tensor, values: Iterable[Tensor | None]) -> None:
        """Write a value of each parameter's size to the buffer; zeros for None."""
        for start, stop, value in zip(self.starts, self.starts[1:], values, strict=False):
            if value is None:
                flat[start:stop].zero_()
            else:
                flat[start:stop].view(value.shape).copy_(value)
