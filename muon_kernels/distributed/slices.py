"""How slices and norms lie in a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORM_BYTES = 8  # bytes of a double


# Of a rank's results, what is worth a collective of its own.
SHARE_BYTES = 16 << 20


# Slices of so many rounds are under way before one is multiplied, and results of so many are not waited for yet: a rank
# that has more to do in one round than in the next holds up no one.
AHEAD, LATE = 2, 2


# Sets of buffers, of a round each.
IN_FLIGHT = AHEAD + 1 + LATE


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


@dataclass
class Buffers:
    """Of one round: slices of what is cut here, and of what is owned here; bytes."""

    slices: Tensor
    owned: Tensor
    norms: Tensor


def record_bytes(elements: int) -> int:
    """Of a slice and its norm, a multiple of 8; none of an empty one."""
    return (-(-2 * elements // NORM_BYTES) + 1) * NORM_BYTES if elements else 0


def matrices_in_round(owned: int, bytes_each: int, cap: int) -> int:
    """Of an owner's matrices, no more than `owned`, how many go through at a time, if they are to fit `cap`."""
    rounds = -(-owned // max(1, cap // bytes_each))
    return -(-owned // rounds)


def bytes_in_flight(workspace_bytes: int, elements: int, replicas: int) -> int:
    """Of one matrix of each owner in a round: of its workspace, and of buffers; there is one from every replica."""
    return workspace_bytes + IN_FLIGHT * 2 * elements * (1 + replicas)


def share_bytes(cap: int, ranks: int) -> int:
    """Of a rank's results, how many go in one collective, but for the last lot's: all ranks' have to fit `cap`."""
    return min(SHARE_BYTES, cap // (IN_FLIGHT * (1 + ranks)))


class Slices(NamedTuple):
    """Slices of one owner's matrices, all of one rank's part, in a buffer: each with room for its norm behind it."""

    offset: int  # in bytes
    matrices: int
    shard: Rectangle

    @property
    def record(self) -> int:
        """Bytes of a slice and what belongs to it."""
        return record_bytes(self.shard.elements)

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.matrices * self.record

    def of(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """(count, rows, cols)."""
        _, _, rows, cols = self.shard
        flat = buffer[self.offset : self.offset + self.bytes].view(dtype)
        return flat.as_strided((self.matrices, rows, cols), (self.record // 2, cols, 1))

    def norms(self, buffer: Tensor) -> Tensor:
        """(count,) float64."""
        flat = buffer[self.offset : self.offset + self.bytes].view(torch.float64)
        step = self.record // NORM_BYTES
        return flat.as_strided((self.matrices,), (step,), flat.storage_offset() + step - 1)


def in_turn(counts: Sequence[tuple[int, Rectangle]]) -> list[Slices]:
    """One after the other in a buffer."""
    found, offset = [], 0
    for count, shard in counts:
        found.append(Slices(offset, count, shard))
        offset += found[-1].bytes
    return found


def all_of(slices: Sequence[Slices]) -> Slices:
    """Those of several owners that follow one another, of the same part."""
    return Slices(slices[0].offset, sum(s.matrices for s in slices), slices[0].shard)


def end_of(slices: Sequence[Slices]) -> int:
    """Return where the last of them ends, in bytes."""
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


def gather_slices(
    received: Sequence[tuple[Rectangle, Tensor, Tensor]], X: Tensor, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Put the matrices together.

    Args:
        received: (where, slices, their norms) of every rank that has any.
        X: (count, m, n), written.
        scaled: whether slices come times a factor that brings their norm to 1/margin.

    Returns:
        (count,) norms of the directions in double, and the exponents of the powers of two that X was multiplied by.
    """
    norms = torch.stack([norms for _, _, norms in received]).square_().sum(0).sqrt_()
    shift = shift_of(norms)
    for (top, left, rows, cols), slices, of_slice in received:
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
