"""Layout of slices and norms in a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gathers import Gathers

NORM_BYTES = 8  # bytes of a double


# Bytes of a rank's results that are worth a collective of their own.
SHARE_BYTES = 16 << 20


# Send slices this many rounds ahead and collect results this many rounds late, so that a rank with a busy round does
# not stall the others.
AHEAD, LATE = 2, 2


# Number of rounds under way at a time; each has a set of buffers.
IN_FLIGHT = AHEAD + 1 + LATE


class Rectangle(NamedTuple):
    """Rows and columns of a matrix that is no taller than wide."""

    top: int
    left: int
    rows: int
    cols: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass
class Buffers:
    """Buffers of one round: bytes for slices of what is sharded here and of what is owned here, norms, and fp32 memory.

    Attributes:
        numbers: for `lots.in_memory` and `lots.normalized`; the same for all rounds.
        gathers: what replicas gather; the same for all rounds.
    """

    slices: Tensor
    owned: Tensor
    norms: Tensor
    numbers: Tensor
    gathers: Gathers


def record_bytes(elements: int) -> int:
    """Return the bytes of a slice with its norm, a multiple of 8; 0 for an empty slice."""
    return (-(-2 * elements // NORM_BYTES) + 1) * NORM_BYTES if elements else 0


def matrices_in_round(owned: int, bytes_each: int, cap: int) -> int:
    """Return how many of an owner's `owned` matrices go in a round of at most `cap` bytes, in equal rounds."""
    rounds = -(-owned // max(1, cap // bytes_each))
    return -(-owned // rounds)


def bytes_in_flight(workspace_bytes: int, elements: int, sharded: bool) -> int:
    """Return the bytes that rounds take for one matrix of each owner: workspace, and buffers of all rounds under way.

    What is sharded comes to the owner in slices, and its own slices go out; of copies an owner has its results only.
    """
    return workspace_bytes + IN_FLIGHT * 2 * elements * (1 + sharded)


def share_bytes(cap: int, ranks: int) -> int:
    """Return the bytes of a rank's results that are worth a collective, so that those of all ranks fit `cap`."""
    return min(SHARE_BYTES, cap // (IN_FLIGHT * (1 + ranks)))


class Slices(NamedTuple):
    """Slices of one owner's matrices in a buffer, all of one rank's shard, each followed by its norm."""

    offset: int  # in bytes
    matrices: int
    shard: Rectangle

    @property
    def record(self) -> int:
        """Bytes of a slice with its norm."""
        return record_bytes(self.shard.elements)

    @property
    def bytes(self) -> int:
        """Total bytes of the slices."""
        return self.matrices * self.record

    def of(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the slices as a view of `buffer`, (count, rows, cols)."""
        _, _, rows, cols = self.shard
        flat = buffer[self.offset : self.offset + self.bytes].view(dtype)
        return flat.as_strided((self.matrices, rows, cols), (self.record // 2, cols, 1))

    def norms(self, buffer: Tensor) -> Tensor:
        """Return the norms as a view of `buffer`, (count,) float64."""
        flat = buffer[self.offset : self.offset + self.bytes].view(torch.float64)
        step = self.record // NORM_BYTES
        return flat.as_strided((self.matrices,), (step,), flat.storage_offset() + step - 1)


def in_turn(counts: Sequence[tuple[int, Rectangle]]) -> list[Slices]:
    """Lay out slices, each given as (matrices, shard), one after the other in a buffer."""
    found, offset = [], 0
    for count, shard in counts:
        found.append(Slices(offset, count, shard))
        offset += found[-1].bytes
    return found


def all_of(slices: Sequence[Slices]) -> Slices:
    """Return as one the slices of several owners that follow one another and are of the same shard."""
    return Slices(slices[0].offset, sum(s.matrices for s in slices), slices[0].shard)


def end_of(slices: Sequence[Slices]) -> int:
    """Return the byte offset at which the last of the slices ends."""
    return slices[-1].offset + slices[-1].bytes


# Exponents beyond which `momentum_update` writes a matrix times a power of two; see csrc/muon_kernels.h.
_UNSCALED = 30

# Exponent that the norms of fp16 directions are brought to. Squares of these are numbers in fp16, and so are elements
# of 2^-20 of the norm, with all their bits.
_HALF = 7


def shift_of(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the exponent of the power of two by which directions of these norms are multiplied.

    In bf16 that is `momentum_update`'s. fp16 has no room for the norms that bf16 leaves as they are: there it brings
    every norm to [2^6, 2^7), see `to_half_norms`.
    """
    exponent = torch.frexp(norms)[1]
    sound = norms.isfinite() & (norms != 0)
    if dtype == torch.float16:
        return (_HALF - exponent).where(sound, 0)
    return (1 - exponent).where(sound & ((norms < 2.0**-_UNSCALED) | (norms > 2.0**_UNSCALED)), 0)


def to_half_norms(x: Tensor, norms: Tensor, scale: Tensor, margin: float) -> None:
    """Multiply fp16 directions by powers of two that bring their norms to [2^6, 2^7).

    A GPU's `momentum_update` has multiplied them by one that depends on the tiles it cut them to, of which only `scale`
    tells.

    Args:
        x: (count, rows, cols) fp16, written.
        norms: (count,) fp64, of the directions.
        scale: (count,) fp32, what brings the norm of x to 1/margin.
        margin: of the coefficient set.
    """
    sound = norms.isfinite() & (norms != 0)
    written = (scale.double() * norms * margin).where(sound, 1.0).log2_().round_().neg_()
    power = torch.exp2(shift_of(norms, x.dtype) - written)
    x.mul_(power.float()[:, None, None])  # which may be below fp16's range


def scale_of(norms: Tensor, shift: Tensor, eps: float, margin: float) -> Tensor:
    """Return the factor that brings matrices of these norms, times 2^shift, to norm 1/margin; see `momentum_update`."""
    mantissa, exponent = torch.frexp(norms)
    size = torch.ldexp(1 / ((2 * mantissa).clamp_min(eps) * margin), 1 - exponent - shift)
    return size.where(norms.isfinite(), torch.nan).where(norms != 0, 0.0).float()


def gather_slices(
    received: Sequence[tuple[Rectangle, Tensor, Tensor]], X: Tensor, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Assemble matrices from the slices of all ranks.

    Args:
        received: (where, slices, their norms) of every rank that holds any.
        X: (count, m, n), written.
        scaled: whether slices come times a factor that brings their norm to 1/margin.

    Returns:
        (count,) norms of the directions in double, and the exponents of the powers of two that X was multiplied by.
    """
    of_slices = torch.stack([norms for _, _, norms in received])
    norms = of_slices.square().sum(0).sqrt_()
    if X.device.type == "cpu" and not scaled and X.dtype != torch.float16 and _unscaled(of_slices, norms):
        for where, slices, _ in received:
            _part(X, where).copy_(slices)
        return norms, torch.zeros_like(norms)
    shift = shift_of(norms, X.dtype)
    for where, slices, of_slice in received:
        target = _part(X, where)
        if scaled:
            target.copy_(slices.float().mul_((of_slice / norms).nan_to_num_(0.0).float()[:, None, None]))
            continue
        power = torch.ldexp(torch.ones_like(norms), shift - shift_of(of_slice, X.dtype))
        power = power.where(of_slice != 0, 1.0)  # infinity times zero is none
        torch.mul(slices, power.to(X.dtype)[:, None, None], out=target)
    return norms, shift


def _part(X: Tensor, where: Rectangle) -> Tensor:
    top, left, rows, cols = where
    return X[:, top : top + rows, left : left + cols]


def _unscaled(of_slices: Tensor, norms: Tensor) -> bool:
    """Whether `shift_of` is 0 for all slices in bf16, and for the matrices of which they are; no NaN is in between."""
    return bool(of_slices.min() >= 2.0**-_UNSCALED) and bool(norms.max() <= 2.0**_UNSCALED)
