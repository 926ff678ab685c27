"""The batched product: csrc/muon_kernels.h's `Product`, in Triton.

A program computes one tile of one matrix. Where the caller knows the result to be symmetric there are programs for one
triangle of tiles only, and each stores its tile and the mirror image of it. The sum of an element is taken in the same
order whatever the tile, so its bits depend on neither batch nor table.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import measured
from .configs import Config, Shape, Table, choose, vendor
from .launch import do, launch
from .operands import fit, require

_VECTOR = 8  # elements in 16 bytes, the widest access of global memory

# A stack of another shape or place, and another coefficient, are no reason to compile anew.
_RUN_TIME = """
    m n k a_batch_stride a_row_stride b_batch_stride b_row_stride c_batch_stride c_row_stride out_batch_stride
    out_row_stride alpha beta gamma
""".split()
_VECTORS = ["a_diagonal", "b_diagonal", "c_diagonal", "out_diagonal", "scale"]


@triton.jit
def _triangular_index(index):
    """Row and column of tile `index` of a lower triangle, counted along its rows."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)  # a guess: floats are not exact
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _tile(stack, row_stride, rows, cols, inside):
    """A tile of a matrix, in fp32; zero outside."""
    at = stack + rows[:, None].to(tl.int64) * row_stride + cols[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_VECTORS)
def _product(
    a,
    b,
    c,
    out,
    a_diagonal,
    b_diagonal,
    c_diagonal,
    out_diagonal,
    scale,
    a_tiles,  # a and b once more, as descriptors of what TMA copies; None where it cannot
    b_tiles,
    m: tl.int32,
    n: tl.int32,
    k: tl.int32,
    a_batch_stride: tl.int64,
    a_row_stride: tl.int64,
    b_batch_stride: tl.int64,
    b_row_stride: tl.int64,
    c_batch_stride: tl.int64,
    c_row_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    alpha: tl.float32,
    beta: tl.float32,
    gamma: tl.float32,
    B_TRANSPOSED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ADDEND: tl.constexpr,  # who c is: "a", "b", "c" or None; a matrix in two places is read once
    SIZE_UNIT: tl.constexpr,  # m, n and k are in units of so many elements
    STRIDE_UNIT: tl.constexpr,  # so are the strides; matrices begin at multiples of it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, n, k = m * SIZE_UNIT, n * SIZE_UNIT, k * SIZE_UNIT
    a_row_stride, b_row_stride = a_row_stride * STRIDE_UNIT, b_row_stride * STRIDE_UNIT
    c_row_stride, out_row_stride = c_row_stride * STRIDE_UNIT, out_row_stride * STRIDE_UNIT

    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles = tiles_m * (tiles_m + 1) // 2 if SYMMETRIC else tiles_m * tiles_n
    index = tl.program_id(0) % tiles
    slot = tl.program_id(0) // tiles
    matrix = slot.to(tl.int64)
    if SYMMETRIC:
        tile_m, tile_n = _triangular_index(index)
    else:  # down the columns, which are short where a result is wide: programs at work share more operands
        tile_m, tile_n = index % tiles_m, index // tiles_m
    row0, col0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)

    a += matrix * (a_batch_stride * STRIDE_UNIT)
    b += matrix * (b_batch_stride * STRIDE_UNIT)
    out += matrix * (out_batch_stride * STRIDE_UNIT)
    if ADDEND == "c":
        c += matrix * (c_batch_stride * STRIDE_UNIT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if a_tiles is not None:
        # What lies outside of a matrix arrives as zeros, so that no step needs masks.
        for step in range(tl.cdiv(k, BLOCK_K)):
            k0 = step * BLOCK_K
            x = a_tiles.load([slot, row0, k0]).reshape(BLOCK_M, BLOCK_K)
            if B_TRANSPOSED:
                acc = tl.dot(x, b_tiles.load([slot, col0, k0]).reshape(BLOCK_N, BLOCK_K).T, acc)
            else:
                acc = tl.dot(x, b_tiles.load([slot, k0, col0]).reshape(BLOCK_K, BLOCK_N), acc)
    else:
        # Rows beyond the last one repeat it: they only make elements that are not stored.
        ks = tl.arange(0, BLOCK_K)
        a_at = a + tl.minimum(rows, m - 1)[:, None].to(tl.int64) * a_row_stride + ks[None, :]
        if B_TRANSPOSED:
            b_at = b + tl.minimum(cols, n - 1)[None, :].to(tl.int64) * b_row_stride + ks[:, None]
            b_step = tl.full((), BLOCK_K, tl.int64)
        else:
            b_at = b + ks[:, None].to(tl.int64) * b_row_stride + cols[None, :]
            b_step = BLOCK_K * b_row_stride
        # The last steps of k are outside of the loop, so that the loop needs no masks of k. If n has no unit, neither
        # needs it exact ones of n: vectors are read whole, and what they have beyond a row is still in the stack. Not
        # so in the last row, which is therefore none of the loop's.
        steps = (k if SIZE_UNIT == STRIDE_UNIT else tl.maximum(k - 1, 0)) // BLOCK_K
        readable = cols[None, :] < tl.cdiv(n, STRIDE_UNIT) * STRIDE_UNIT
        for _ in range(steps):
            if B_TRANSPOSED:
                acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
            else:
                acc = tl.dot(tl.load(a_at), tl.load(b_at, mask=readable, other=0.0), acc)
            a_at += BLOCK_K
            b_at += b_step
        left = k - steps * BLOCK_K
        if left > 0:
            b_left = ks[:, None] < left if B_TRANSPOSED else (ks[:, None] < left) & (cols[None, :] < n)
            x = tl.load(a_at, mask=ks[None, :] < left, other=0.0)
            acc = tl.dot(x, tl.load(b_at, mask=b_left, other=0.0), acc)

    factor = 1.0
    if scale is not None:
        factor = tl.load(scale + matrix)
        if B_TRANSPOSED:
            factor *= factor
    alpha *= factor
    beta *= factor
    of_m = matrix * m + rows  # of the diagonals
    # The halves of a wide tile one after the other: registers have no room for addends beside all of its sums.
    PARTS: tl.constexpr = 2 if BLOCK_N > 128 else 1
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split() if PARTS == 2 else (acc,)
    for part in tl.static_range(PARTS):
        acc = parts[part] * alpha
        first = col0 + part * WIDTH
        cols = first + tl.arange(0, WIDTH)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        if ADDEND == "c":
            acc += beta * _tile(c, c_row_stride, rows, cols, inside)
        of_a, of_b = beta if ADDEND == "a" else 0.0, beta if ADDEND == "b" else 0.0
        if a_diagonal is not None:
            by_row = (alpha * tl.load(a_diagonal + of_m, mask=rows < m, other=0.0))[:, None]
            if B_TRANSPOSED:
                of_a += by_row
            else:
                of_b += by_row
        if b_diagonal is not None:
            of_a += (alpha * tl.load(b_diagonal + matrix * n + cols, mask=cols < n, other=0.0))[None, :]
        if ADDEND == "a" or b_diagonal is not None or (a_diagonal is not None and B_TRANSPOSED):
            acc += of_a * _tile(a, a_row_stride, rows, cols, inside)
        if ADDEND == "b" or (a_diagonal is not None and not B_TRANSPOSED):
            acc += of_b * _tile(b, b_row_stride, rows, cols, inside)

        if (row0 < first + WIDTH) & (first < row0 + BLOCK_M):
            on_diagonal = rows[:, None] == cols[None, :]
            value = tl.sum(tl.where(on_diagonal, acc, 0.0), 1) + gamma * factor
            if a_diagonal is not None and b_diagonal is not None:
                value += alpha * tl.load(a_diagonal + of_m, mask=rows < m) * tl.load(b_diagonal + of_m, mask=rows < m)
            if c_diagonal is not None:
                value += beta * tl.load(c_diagonal + of_m, mask=rows < m)
            acc = tl.where(on_diagonal, value[:, None], acc)
            if out_diagonal is not None:
                here = (rows < m) & (rows >= first) & (rows < first + WIDTH)
                tl.store(out_diagonal + of_m, value - value.to(out.dtype.element_ty).to(tl.float32), mask=here)

        result = acc.to(out.dtype.element_ty)
        at = out + rows[:, None].to(tl.int64) * out_row_stride + cols[None, :]
        if SYMMETRIC:
            mirrored = tl.trans(result)
            if row0 == col0:
                tl.store(at, tl.where(rows[:, None] >= cols[None, :], result, mirrored), mask=inside)
            else:
                mirrored_at = out + cols[:, None].to(tl.int64) * out_row_stride + rows[None, :]
                tl.store(at, result, mask=inside)
                tl.store(mirrored_at, mirrored, mask=(cols[:, None] < n) & (rows[None, :] < m))
        else:
            tl.store(at, result, mask=inside)


@cache
def _gpu(device: int) -> tuple[Table, int]:
    """Return the table of the current device and its number of multiprocessors."""
    return measured.table(), int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])


class _Place(NamedTuple):
    """Address and strides of a stack. It keeps no memory alive, so it can be kept.

    Attributes:
        strides: of matrices and rows, in elements.
    """

    address: int
    shape: torch.Size
    strides: tuple[int, int]
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """Return the address, as a tensor does; descriptors are made from it."""
        return self.address

    @staticmethod
    def of(t: Tensor) -> _Place:
        """A batch of one has no distance of matrices that matters."""
        return _Place(t.data_ptr(), t.shape, (t.stride(0) if len(t) > 1 else 0, t.stride(1)), t.dtype)

    def vectorized(self) -> bool:
        """Whether all rows begin at 16 bytes."""
        return (self.address | 2 * self.strides[0] | 2 * self.strides[1]) % (2 * _VECTOR) == 0


class _Launch(NamedTuple):
    """Launch of a product of operands in these places, whatever its coefficients.

    Attributes:
        vendor: see configs.vendor.
        addend: who c is.
        tiles: descriptors of a and b, or None.
        numbers: sizes and strides.
        options: of the compilation.
    """

    vendor: bool
    programs: int
    addend: str | None
    tiles: tuple[TensorDescriptor | None, TensorDescriptor | None]
    numbers: tuple[int, ...]
    options: dict[str, Any]


@lru_cache(maxsize=1024)
def _descriptor(stack: _Place, *block: int) -> TensorDescriptor:
    matrices, rows = stack.strides
    return TensorDescriptor(stack, list(stack.shape), [matrices or rows, rows, 1], [1, *block])


def _describable(stack: _Place) -> bool:
    """Whether TMA can copy tiles of it: 16-byte alignment, something there, and strides below 2^40 bytes."""
    matrices, rows = stack.strides
    far = (matrices if stack.shape[0] > 1 else rows), rows
    return stack.vectorized() and stack.shape.numel() > 0 and all(0 < s < 2**39 for s in far)


@lru_cache(maxsize=1024)
def _launch(
    device: int,
    a: _Place,
    b: _Place,
    c: _Place | None,
    out: _Place,
    b_transposed: bool,
    symmetric: bool,
    config: Config | None,
) -> _Launch:
    """Descriptors cost microseconds, and stacks keep their places between steps: so it is remembered."""
    (batch, m, n), k = out.shape, a.shape[2]
    table, multiprocessors = _gpu(device)
    shape = Shape(batch, m, n, k, symmetric)
    config = config or choose(shape, table, multiprocessors)
    programs = batch * config.tiles(m, n, symmetric)
    require(programs < 2**31)

    addend = None if c is None else "a" if c == a else "b" if c == b else "c"
    stacks = [a, b, out] if c is None else [a, b, c, out]
    stride_unit = _VECTOR if all(t.vectorized() for t in stacks) else 1
    size_unit = _VECTOR if stride_unit > 1 and (m | n | k) % _VECTOR == 0 else 1
    strides = [
        s // stride_unit for t in (a, b, c if addend == "c" else None, out) for s in (t.strides if t else (0, 0))
    ]
    tiles: tuple[TensorDescriptor | None, TensorDescriptor | None] = None, None
    if config.tma and _describable(a) and _describable(b):
        b_block = (config.block_n, config.block_k) if b_transposed else (config.block_k, config.block_n)
        tiles = _descriptor(a, config.block_m, config.block_k), _descriptor(b, *b_block)
    options = dict(
        B_TRANSPOSED=b_transposed,
        SYMMETRIC=symmetric,
        ADDEND=addend,
        SIZE_UNIT=size_unit,
        STRIDE_UNIT=stride_unit,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if config.registers and tiles[0] is not None:  # addresses of what is not aligned take more of them
        options["maxnreg"] = config.registers
    sizes = m // size_unit, n // size_unit, k // size_unit
    return _Launch(vendor(shape, table), programs, addend, tiles, (*sizes, *strides), options)


def forget_choices() -> None:
    """Forget what was chosen by the table that was there before another was kept."""
    _gpu.cache_clear()
    _launch.cache_clear()


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """The vendor's product of two matrices, not rounded to their dtype; what has no such product is converted."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def gemm_by_vendor(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    a_diagonal: Tensor | None,
    alpha: float,
    beta: float,
    scale: Tensor | None,
) -> None:
    """Do as `product`, by the vendor's library. All is added in fp32, so that there is but one rounding here, too."""
    for i in range(len(out)):  # one after the other: sums take twice the memory of a result
        sums = _product_in_fp32(a[i], b[i])
        if a_diagonal is not None:
            sums.addcmul_(a_diagonal[i, :, None], b[i])
        if alpha != 1:
            sums *= alpha
        if c is not None:
            sums.add_(c[i], alpha=beta)
        if scale is not None:
            sums *= scale[i]
        out[i].copy_(sums)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    a_diagonal: Tensor | None = None,
    b_diagonal: Tensor | None = None,
    b_transposed: bool = False,
    c: Tensor | None = None,
    c_diagonal: Tensor | None = None,
    out_diagonal: Tensor | None = None,
    symmetric: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write out[i] = scale[i]^(2 if b_transposed else 1)·(alpha·a[i]·b[i] + beta·c[i] + gamma·I).

    Stacks are bf16 or f16 with a column stride of 1, sums fp32. `*_diagonal`, fp32 and contiguous, is what rounding
    took from the diagonal of a square matrix; it is part of it, and `out_diagonal` is written.

    Args:
        a: (batch, m, k).
        b: (batch, k, n), or (batch, n, k) if b_transposed; a correction of a then takes a to be symmetric and b to be
            a.
        out: (batch, m, n), written; must not overlap an operand.
        a_diagonal: (batch, m), m = k.
        b_diagonal: (batch, n), k = n.
        b_transposed: multiply by b's transpose.
        c: (batch, m, n).
        c_diagonal: (batch, m).
        out_diagonal: (batch, m), written.
        symmetric: the caller knows that the result is symmetric; its lower triangle is computed, and mirrored.
        alpha: multiplies the product.
        beta: multiplies c.
        gamma: added to the diagonal.
        scale: (batch,) fp32, 1 if absent.
        config: the tiles; None for those that `configs.choose` takes.
    """
    diagonals = a_diagonal, b_diagonal, c_diagonal, out_diagonal
    require(fit(a, b, c, out, diagonals, scale, b_transposed, symmetric))
    if not out.numel():
        return

    how = _launch(
        driver.active.get_current_device(),
        _Place.of(a),
        _Place.of(b),
        None if c is None else _Place.of(c),
        _Place.of(out),
        b_transposed,
        symmetric,
        config,
    )
    corrected = any(d is not None for d in (b_diagonal, c_diagonal, out_diagonal))
    if how.vendor and config is None and not (b_transposed or corrected or gamma):
        # What torch then has at hand, the sums can have.
        room = partial(torch.empty, out.shape[1:], dtype=torch.float32, device=out.device)
        do(partial(gemm_by_vendor, a, b, c, out, a_diagonal, alpha, beta, scale), room)
        return
    launch(
        _product,
        how.programs,
        a,
        b,
        c if how.addend == "c" else None,
        out,
        a_diagonal,
        b_diagonal,
        c_diagonal,
        out_diagonal,
        scale,
        *how.tiles,
        *how.numbers,
        alpha,
        beta,
        gamma,
        **how.options,
    )
