"""State that is kept in fewer bits than it is computed with: momentum in eight bits, fp32 parameters in two halves.

A step unpacks a chunk to fp32 numbers in memory of the workspace, runs the ordinary verbs on those, and packs them
again. So every backend supports it, and never more than a chunk is there in fp32.

There are two forms. `Quantized` is blocks of 2048 numbers as int8 codes, with the largest magnitude of each block: the
linear kind of 8-bit Muon (arXiv 2509.23106). Blocks are counted in every matrix by itself, along the rows of the
parameter or of the piece that `split` makes of it. `Halves` is the bits of an fp32 number as

    (bits of a bf16 number << 16) + a signed int16

which makes the bf16 number the fp32 one rounded to nearest, halfway away from zero, as in the `store_param_remainders`
of NVIDIA's FusedAdam.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import memory
from ..layout import Layout, Matrices, PieceShape, split_shape, view
from ..split import pieces
from ..tensors import check_dense, check_like, local
from .stage import Stage

BLOCK = 2048

# The code of NaN and infinity. Those of numbers are symmetric, -127 to 127.
_NAN = -128

# Elements that are packed at a time, whole blocks. On a processor they stay in its cache.
_PIECE, _PIECE_ON_CPU = 1 << 20, 1 << 18

_Seen = TypeVar("_Seen")

# Passes over the fp32 memory to unpack numbers and to pack them. The verbs read and write it besides.
_VISITS = 2


class _InFp32(Stage):
    """Stage of state that is kept in fewer bits and computed with in fp32 memory of the workspace."""

    launches = _VISITS
    state_bytes = 4 * (_VISITS + 2)
    packed = 1


class EightBitMomentum(_InFp32):
    """Stage of `momentum_dtype=torch.int8`."""

    note = "momentum_dtype=torch.int8 goes through fp32 memory of the workspace, and no step with it is fused"


class MasterWeights(_InFp32):
    """Stage of `master_weights`."""

    option = "master_weights"
    note = "master_weights goes through fp32 memory of the workspace, and no step with it is fused"


def floats(rows: int, cols: int) -> int:
    """Return the fp32 numbers of memory for a matrix: its elements, padded so that the next is aligned to 64 bytes."""
    return -(-rows * cols // 16) * 16


def blocks_in(elements: int) -> int:
    """Return the number of blocks of a matrix with so many elements; the last block may be shorter."""
    return -(-elements // BLOCK)


def encode(x: Tensor, absmax: Tensor, out: Tensor, divisor: Tensor, is_zero: Tensor) -> None:
    """Write the codes round(127 x / absmax) of blocks (..., length), as fp32 numbers.

    Args:
        x: (..., length), only read.
        absmax: (...) fp32, written.
        out: like x, written.
        divisor, is_zero: (...) fp32 and bool, overwritten.
    """
    torch.nan_to_num(x, 0.0, 0.0, 0.0, out=out).abs_()
    torch.amax(out, -1, out=divisor)
    absmax.copy_(divisor)
    divisor.masked_fill_(torch.eq(divisor, 0, out=is_zero), 1.0)
    # Divided first: 127 x would leave fp32's range where x is large.
    torch.div(x, divisor.unsqueeze(-1), out=out)
    out.mul_(127).round_().nan_to_num_(_NAN, _NAN, _NAN)


def decode_(x: Tensor, absmax: Tensor) -> None:
    """Replace the codes x, (..., length), by the numbers that they stand for; absmax is (...)."""
    # Divided first, so that code 127 gives absmax exactly and packing finds the same absmax again. `threshold` turns
    # the code -128 into NaN in the same pass.
    F.threshold(x.div_(127), (_NAN + 0.5) / 127, math.nan, inplace=True).mul_(absmax.unsqueeze(-1))


def pieces_of_shape(shape: Sequence[int], flatten: bool | None, split: str | None) -> list[PieceShape]:
    """Return the pieces of a parameter of this size, whose blocks are counted in this order."""
    return [(piece, split_shape(shape, flatten, piece)) for piece in pieces(tuple(shape), flatten, split)]


def scale_size(shapes: Sequence[PieceShape]) -> int:
    """Return the number of blocks of a parameter in these pieces."""
    return sum(count * blocks_in(rows * cols) for _, (count, rows, cols) in shapes)


def scales_of(scale: Tensor, shapes: Sequence[PieceShape], count: int) -> list[Tensor]:
    """Return the absmax of each of `count` pieces of a parameter, (matrices, blocks), as views of `scale`, that of all.

    Equal parts of the parameter may be stepped as one piece or as separate ones, as strides want it. Their absmax stays
    at the same place here.
    """
    start = 0
    found: list[Tensor] = []
    for piece, (matrices, rows, cols) in shapes:
        blocks = blocks_in(rows * cols)
        stop = start + matrices * blocks
        own = scale[start:stop].view(matrices, blocks)
        if piece is not None and count > len(shapes):
            found += own.view(matrices // piece.parts, piece.parts, blocks).unbind(1)
        else:
            found.append(own)
        start = stop
    return found


def _chunk_elements(device: torch.device) -> int:
    return _PIECE_ON_CPU if device.type == "cpu" else _PIECE


def _chunks(values: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield (matrices, first element, last + 1), chunk by chunk, of values (matrices, elements)."""
    count, elements = values.shape
    most = _chunk_elements(values.device)
    at_once = max(1, most // elements)
    for i in range(0, count, at_once):
        for begin in range(0, elements, most):
            yield slice(i, i + at_once), begin, min(begin + most, elements)


def _largest_chunk(stored: Tensor) -> tuple[int, int]:
    """Return the size of the first of `_chunks`, which is the largest."""
    count, rows, cols = stored.shape
    most = _chunk_elements(stored.device)
    return min(count, max(1, most // (rows * cols))), min(most, rows * cols)


def _rectangles(stored: Tensor, x: Tensor, begin: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rectangles of `stored`, each with the view of x that holds its elements.

    Args:
        stored: (matrices, rows, cols) of any strides.
        x: (matrices, elements), elements from `begin` on in row-major order.
        begin: first element of x in a matrix.
    """
    cols, first, end = stored.shape[2], begin, begin + x.shape[1]
    while begin < end:
        row, col = divmod(begin, cols)
        whole = 0 if col else (end - begin) // cols
        stop = begin + whole * cols if whole else min(end, (row + 1) * cols)
        part = stored[:, row : row + max(whole, 1), col : cols if whole else col + stop - begin]
        yield part, x[:, begin - first : stop - first].view(part.shape)
        begin = stop


def _read(stored: Tensor, x: Tensor, begin: int) -> None:
    for part, own in _rectangles(stored, x, begin):
        own.copy_(part)


def _write(stored: Tensor, x: Tensor, begin: int) -> None:
    for part, own in _rectangles(stored, x, begin):
        part.copy_(own)


def _in_blocks(x: Tensor, absmax: Tensor, begin: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of x as (matrices, blocks, length), each with its absmax.

    The elements of x begin at `begin` in their matrices, a multiple of BLOCK. The last block may be shorter.
    """
    whole, first = x.shape[1] // BLOCK, begin // BLOCK
    if whole:
        yield x[:, : whole * BLOCK].view(-1, whole, BLOCK), absmax[:, first : first + whole]
    if x.shape[1] % BLOCK:
        yield x[:, None, whole * BLOCK :], absmax[:, first + whole :]


class Quantized(NamedTuple):
    """Matrices in eight bits.

    Attributes:
        stored: (matrices, rows, cols) int8 codes, see `encode`; rows and columns are the parameter's.
        transposed: whether the verbs see them transposed, as in `Layout`.
        absmax: (matrices, blocks) fp32.
    """

    stored: Tensor
    transposed: bool
    absmax: Tensor

    def unpack(self, values: Tensor) -> None:
        """Write the numbers to `values`, (matrices, elements) fp32."""
        for i, begin, end in _chunks(values):
            x = values[i, begin:end]
            _read(self.stored[i], x, begin)
            for block, absmax in _in_blocks(x, self.absmax[i], begin):
                decode_(block, absmax)

    def pack(self, values: Tensor) -> None:
        """Write the codes and absmax of `values`, (matrices, elements) fp32."""
        for i, begin, end in _chunks(values):
            x = values[i, begin:end]
            codes, divisor, is_zero = memory.take(x.device, *self._wanted(*x.shape))
            for (block, absmax), (out, beside) in zip(
                _in_blocks(x, self.absmax[i], begin), _in_blocks(codes, divisor, 0), strict=True
            ):
                encode(block, absmax, out, beside, is_zero[:, : beside.shape[1]])
            _write(self.stored[i], codes, begin)

    @staticmethod
    def _wanted(count: int, elements: int) -> list[tuple[tuple[int, int], torch.dtype]]:
        blocks = (count, blocks_in(elements))
        return [((count, elements), torch.float32), (blocks, torch.float32), (blocks, torch.bool)]

    def reserve(self) -> None:
        """Take the scratch memory that `pack` will take; see memory.py."""
        memory.take(self.stored.device, *self._wanted(*_largest_chunk(self.stored)))


def quantized(numbers: Tensor, flatten: bool | None, shapes: Sequence[PieceShape]) -> tuple[Tensor, Tensor]:
    """Return new codes and absmax of the floating-point momentum of a parameter in these pieces."""
    codes = torch.empty(numbers.shape, dtype=torch.int8, device=numbers.device)
    absmax = torch.zeros(scale_size(shapes), dtype=torch.float32, device=numbers.device)
    for own, at, values in _by_piece(absmax, codes, numbers, flatten, shapes):
        found = Quantized(torch.empty(values.shape, dtype=torch.int8, device=values.device), False, own)
        found.pack(values.float().flatten(1))
        at.copy_(found.stored.view_as(at))
    return codes, absmax


def dequantized(codes: Tensor, absmax: Tensor, flatten: bool | None, shapes: Sequence[PieceShape]) -> Tensor:
    """Return the fp32 numbers, in a new tensor, that the results of `quantized` stand for."""
    numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for own, at, values in _by_piece(absmax, numbers, codes, flatten, shapes):
        found = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        Quantized(values, False, own).unpack(found.flatten(1))
        at.copy_(found.view_as(at))
    return numbers


def _by_piece(
    absmax: Tensor, out: Tensor, given: Tensor, flatten: bool | None, shapes: Sequence[PieceShape]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each piece that has elements, its absmax, its view of `out`, and its elements of `given`.

    These are (matrices, rows, cols), a view where strides allow it.
    """
    order = tuple(range(1, given.ndim))  # blocks are along logical rows, whatever the strides
    for (piece, shape), own in zip(shapes, scales_of(absmax, shapes, len(shapes)), strict=True):
        places = [view(t.shape, t.stride(), flatten, order, piece).of(t) for t in (out, given)]
        if own.numel():
            yield own, places[0], places[1].reshape(shape)


class Halves(NamedTuple):
    """Matrices in fp32 whose upper half is bf16.

    Attributes:
        stored: (matrices, rows, cols) bf16, the numbers rounded to nearest; rows and columns are the parameter's.
        transposed: whether the verbs see them transposed, as in `Layout`.
        mantissa: (matrices, rows, cols) int16, the lower half of the bits.
    """

    stored: Tensor
    transposed: bool
    mantissa: Tensor

    def unpack(self, values: Tensor) -> None:
        """Write the numbers to `values`, (matrices, elements) fp32."""
        upper = self.stored.view(torch.int16)
        for i, begin, end in _chunks(values):
            bits = values[i, begin:end].view(torch.int32)
            (lower,) = memory.take(bits.device, (bits.shape, torch.int32))
            _read(upper[i], bits, begin)
            _read(self.mantissa[i], lower, begin)
            bits.bitwise_left_shift_(16).add_(lower)

    def pack(self, values: Tensor) -> None:
        """Write both halves of `values`, (matrices, elements) fp32, which is overwritten.

        Every NaN becomes the NaN whose lower half is zero.
        """
        upper = self.stored.view(torch.int16)
        for i, begin, end in _chunks(values):
            x = values[i, begin:end].nan_to_num_(math.nan, math.inf, -math.inf)
            bits = x.view(torch.int32)
            _write(self.mantissa[i], bits, begin)  # the lower 16 bits, read as a signed number
            (rounded,) = memory.take(bits.device, (bits.shape, torch.int32))
            _write(upper[i], torch.add(bits, 1 << 15, out=rounded).bitwise_right_shift_(16), begin)

    def reserve(self) -> None:
        """Take the scratch memory that `unpack` and `pack` will take; see memory.py."""
        memory.take(self.stored.device, (_largest_chunk(self.stored), torch.int32))


class Packed(list[Quantized | Halves]):
    """Packed matrices of a chunk; consecutive ones of a parameter, or of a piece of it, are one item."""

    def in_memory(self, numbers: Tensor) -> Iterator[tuple[Quantized | Halves, Tensor]]:
        """Yield each item with the view of `numbers`, (batch, `floats`), where it is unpacked: (matrices, elements)."""
        start = 0
        for part in self:
            count, rows, cols = part.stored.shape
            yield part, numbers[start : start + count, : rows * cols]
            start += count


@contextmanager
def unpacked(matrices: _Seen | Packed, numbers: Tensor | None, rehearsing: bool) -> Iterator[_Seen | list[Matrices]]:
    """Yield matrices that verbs can read and write; pack again, at the end, what they have written.

    Args:
        matrices: to unpack. Matrices that are not packed are yielded as they are.
        numbers: (batch, `floats`) fp32 memory of the workspace.
        rehearsing: whether only to take the scratch memory, and to read and write nothing.
    """
    if not isinstance(matrices, Packed):
        yield matrices
        return
    assert numbers is not None
    seen, stride = [], numbers.stride(0)
    for part, values in matrices.in_memory(numbers):
        if rehearsing:
            part.reserve()
        else:
            part.unpack(values)
        count, rows, cols = part.stored.shape
        dims = (cols, rows, 0, stride, 1, cols) if part.transposed else (rows, cols, 0, stride, cols, 1)
        seen.append(Matrices(values, Layout(count, *dims, part.transposed)))
    yield seen
    if not rehearsing:
        for part, values in matrices.in_memory(numbers):
            part.pack(values)


def check_momentum_scale(name: str, scale: Any, shapes: Sequence[PieceShape]) -> None:
    """Raise ValueError or TypeError unless `scale` can be the absmax of an int8 momentum in these pieces."""
    if scale is None:
        raise ValueError(
            f"{name} should be in the state beside a momentum_buffer of int8 but is not; delete that from the state to "
            "start anew"
        )
    check_dense(name, scale)
    expected = (scale_size(shapes),)
    if scale.shape != expected or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} should be of size {expected}, one for every block of each matrix, and float32 but is of size "
            f"{tuple(scale.shape)} and {str(scale.dtype).removeprefix('torch.')}; were flatten or split others then? "
            "delete momentum_buffer from the state to start anew"
        )


def check_master(p: Tensor) -> None:
    """Raise TypeError unless `p` is bf16, which can be the upper half of an fp32 parameter."""
    if p.dtype != torch.bfloat16:
        raise TypeError(
            f"master_weights is of torch.bfloat16 parameters but one is of: {p.dtype}; "
            "put it into a group with master_weights=False"
        )


def check_mantissa(name: str, mantissa: Any, p: Tensor) -> None:
    """Raise ValueError or TypeError unless `mantissa` can be the lower half of fp32 numbers whose upper half is `p`."""
    check_dense(name, local(mantissa), (torch.int16,))
    check_like(name, mantissa, p)
