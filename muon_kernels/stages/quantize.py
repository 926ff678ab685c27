"""Quantization to eight bits: blocks of 2048 numbers as int8 codes and the largest magnitude of each block.

Source: 8-bit Muon, https://arxiv.org/abs/2509.23106, the linear kind.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tensors import check_dense
from .packed import BLOCK, decode_, encode

__all__ = ["BLOCK", "dequantize", "quantize"]


@torch.no_grad()
def quantize(x: Tensor, block: int = BLOCK, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes round(127 x / absmax) of x and absmax, the largest |x| of each block of consecutive elements.

    The codes stand for numbers that differ from x by at most absmax / 254. Quantizing these again gives the same codes
    and absmax, so a momentum that is only read loses nothing. The result takes 1.002 bytes an element.

    Args:
        x: any size and strides, of a floating dtype; only read. Rounded to float32 first if it is float64.
        block: number of elements, in row-major order and whatever the dimensions, that share an absmax; the last block
            may be shorter.
        out: (codes, absmax) to write to, of the sizes below.

    Returns:
        codes: int8, of x's size, contiguous if new. NaN and infinity have the code -128, which stands for NaN; their
            neighbours are not affected.
        absmax: float32, (ceil(elements / block),), of the finite elements; 0 for a block of zeros, which is exact.

    Raises:
        ValueError, TypeError: an argument that cannot be used; nothing has been written then.
    """
    check_dense("x", x)
    blocks = _blocks(x.numel(), block)
    codes, absmax = out or (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(blocks, dtype=torch.float32, device=x.device),
    )
    _check_pair(codes, absmax, blocks)
    if codes.shape != x.shape:
        raise ValueError(f"codes should have x's size {tuple(x.shape)} but have: {tuple(codes.shape)}")
    rows = _rows(x.detach().float(), blocks, block)
    found = torch.empty_like(rows)
    encode(rows, absmax, found, torch.empty_like(absmax), torch.empty_like(absmax, dtype=torch.bool))
    codes.copy_(_elements(found, x.shape))
    return codes, absmax


@torch.no_grad()
def dequantize(codes: Tensor, absmax: Tensor, block: int = BLOCK, *, out: Tensor | None = None) -> Tensor:
    """Return the numbers (codes / 127) absmax that the results of `quantize` stand for.

    Args:
        codes: int8, of any size and strides; only read.
        absmax: float32, (ceil(elements / block),); only read.
        block: as it was quantized with.
        out: of codes' size and a floating dtype, to write to.

    Returns:
        out, or a new float32 tensor of codes' size.

    Raises:
        ValueError, TypeError: an argument that cannot be used; nothing has been written then.
    """
    blocks = _blocks(codes.numel(), block)
    _check_pair(codes, absmax, blocks)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device) if out is None else out
    check_dense("out", out)
    if out.shape != codes.shape:
        raise ValueError(f"out should have the codes' size {tuple(codes.shape)} but has: {tuple(out.shape)}")
    rows = _rows(codes.float(), blocks, block)
    decode_(rows, absmax)
    return out.copy_(_elements(rows, codes.shape))


def _blocks(elements: int, block: int) -> int:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block should be an int >= 1 but is: {block!r}")
    return -(-elements // block)


def _check_pair(codes: Tensor, absmax: Tensor, blocks: int) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"codes should be of torch.int8 but are of: {codes.dtype}")
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax should be of torch.float32 but is of: {absmax.dtype}")
    if absmax.shape != (blocks,):
        raise ValueError(f"absmax should have size ({blocks},), one a block, but has: {tuple(absmax.shape)}")


def _rows(x: Tensor, blocks: int, block: int) -> Tensor:
    """Return x as (blocks, block), with zeros after the last element."""
    return F.pad(x.reshape(-1), (0, blocks * block - x.numel())).view(blocks, block)


def _elements(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.view(-1)[: shape.numel()].view(shape)
