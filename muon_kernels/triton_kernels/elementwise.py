"""momentum_update and apply_update: one pass over all matrices of a bucket each, and a small launch for the norms.

A program has a tile of a matrix and walks it along the lines in which gradient, momentum or parameter are contiguous;
where those are the columns of x, the tile is transposed on the chip, so that x is contiguous all the same. Matrices of
both kinds share a launch.

Formulas, guards and powers of two are those of csrc/muon_kernels.h, and so are the random bits of stochastic rounding:
a step is the same to the bit whoever takes it, but for the order of the sums of squares.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate
from . import tables
from .configs import BLOCK, scratch_bytes
from .launch import launch

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A compiler that fused `end - start` with the product that made `end` would not be torch.lerp's to the bit; what may
# be fused is written as such.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


# ---- a tile of a matrix ----


@triton.jit
def matrix_at(refs, matrix, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to a matrix of a table, its row stride and its column stride."""
    ref = refs + 3 * matrix
    at = tl.load(ref).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(at, 16) if WIDTH > 1 else at, tl.load(ref + 1), tl.load(ref + 2)


@triton.jit
def walks_columns(row_stride, col_stride):
    """Return whether a matrix is walked along its columns; tables.py says the same of it."""
    return (row_stride == 1) & (col_stride != 1)


@triton.jit
def vectors_of(n, WIDTH: tl.constexpr):
    """The same number. It is a multiple of what is moved at once, and now the compiler knows: a hint on an argument
    would be lost where a function is inlined."""
    return n // WIDTH * WIDTH if WIDTH > 1 else n


@triton.jit
def walk(at, row_stride, col_stride, tall, line, along, WIDTH: tl.constexpr):
    """Pointers to the elements of a tile, (lines, along)."""
    line_stride = vectors_of(tl.where(tall, col_stride, row_stride), WIDTH)
    along_stride = 1 if WIDTH > 1 else tl.where(tall, row_stride, col_stride)
    return at + line[:, None] * line_stride + along[None, :] * along_stride


@triton.jit
def tile_of(pid, M, N, tall, BLOCK: tl.constexpr):
    """Return (row, column) of a tile, counted in tiles: neighbouring programs are neighbours along the walk."""
    down, across = tl.cdiv(M, BLOCK), tl.cdiv(N, BLOCK)
    return tl.where(tall, pid % down, pid // across), tl.where(tall, pid // down, pid % across)


@triton.jit
def x_at(x, matrix, batch_stride, row_stride, rows, cols, WIDTH: tl.constexpr):
    """Pointers to the elements of x, (rows, cols)."""
    x += matrix * batch_stride
    if WIDTH > 1:
        x = tl.multiple_of(x, 16)
    return x + rows[:, None] * vectors_of(row_stride, WIDTH) + cols[None, :]


# ---- powers of two ----


@triton.jit
def exponent(v):
    """floor(log2(v)) of a positive normal float64."""
    return ((v.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023


@triton.jit
def power(e):
    """2^e in float64."""
    return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def times_power(v, e):
    """v · 2^e, by two factors: one alone could leave the range of fp32."""
    half = e >> 1
    return v * power(half).to(tl.float32) * power(e - half).to(tl.float32)


@triton.jit
def tile_power(sum_of_squares, HALF: tl.constexpr):
    """The power of two that a tile, or the largest tile of a matrix, is multiplied by in x.

    In an f16 x it brings the norm to [1, 2^15): nothing overflows, and what is at least 2^-14 times a norm keeps all
    its bits. It depends on the tile alone and comes in steps of 2^15, half of f16's range, so that nearly always all
    tiles of a matrix have the same one. In a bf16 x it keeps elements that matter out of those below the normal range,
    which rounding may double or drop: 7e-41 becomes 9e-41.
    """
    if not HALF:
        return tl.where((sum_of_squares > 0) & (sum_of_squares < 2.0**-200), 100, 0)
    # Steps begin at norms of 2^-12; made positive for the division.
    e = 12 - 15 * ((exponent(sum_of_squares) + 24 + 30 * 64) // 30 - 64)
    return tl.where((sum_of_squares > 0) & (sum_of_squares < float("inf")), e, 0)


# ---- momentum_update ----


@triton.jit
def lerp(start, end, weight):
    """torch.lerp, with its two branches: a momentum buffer equals torch.optim.Muon's to the bit."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def blend(grad, momentum, mu, rest, DAMPENED: tl.constexpr):
    """The new momentum; rest = 1 - mu, rounded once."""
    return lerp(momentum, grad, rest) if DAMPENED else tl.fma(mu, momentum, grad)


@triton.jit
def look_ahead(grad, momentum, mu, DAMPENED: tl.constexpr):
    """The Nesterov direction from the new momentum."""
    return lerp(grad, momentum, mu) if DAMPENED else tl.fma(mu, momentum, grad)


@triton.jit(do_not_specialize=["x", "partial", "M", "N", "x_batch_stride", "x_row_stride"])
def momentum_kernel(
    grads, momenta, x, partial, M, N, x_batch_stride: tl.int64, x_row_stride: tl.int64,
    grad_scale: tl.float32, mu: tl.float32, rest: tl.float32,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DAMPENED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile: momentum, direction, and the sum of its squares in float64 to `partial`, [batch, tiles].

    Every tile of x is written times its own `tile_power`.
    """
    tiles = tl.cdiv(M, BLOCK) * tl.cdiv(N, BLOCK)
    matrix = tl.program_id(0) // tiles
    grad, grad_row, grad_col = matrix_at(grads, matrix, GRAD, WIDTH)
    tall = walks_columns(grad_row, grad_col)
    if momenta is not None:
        momentum, momentum_row, momentum_col = matrix_at(momenta, matrix, MOMENTUM, WIDTH)
        tall = walks_columns(momentum_row, momentum_col)
    tile_row, tile_col = tile_of(tl.program_id(0) % tiles, M, N, tall, BLOCK)
    line = tl.where(tall, tile_col, tile_row) * BLOCK + tl.arange(0, BLOCK)
    along = tl.where(tall, tile_row, tile_col) * BLOCK + tl.arange(0, BLOCK)
    lines = tl.where(tall, N, M)
    inside = (line[:, None] < lines) & (along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH))

    from_grad = walk(grad, grad_row, grad_col, tall, line, along, WIDTH)
    direction = tl.load(from_grad, inside, 0.0).to(tl.float32) * grad_scale
    if momenta is not None:
        at_momentum = walk(momentum, momentum_row, momentum_col, tall, line, along, WIDTH)
        new = blend(direction, tl.load(at_momentum, inside, 0.0).to(tl.float32), mu, rest, DAMPENED)
        tl.store(at_momentum, new.to(MOMENTUM), inside)
        direction = look_ahead(direction, new, mu, DAMPENED) if NESTEROV else new

    precise = direction.to(tl.float64)
    square = tl.sum(precise * precise)
    tl.store(partial + matrix.to(tl.int64) * tiles + tile_row * tl.cdiv(N, BLOCK) + tile_col, square)
    X: tl.constexpr = x.dtype.element_ty
    direction = times_power(direction, tile_power(square, X == tl.float16))
    if tall:
        to_x = x_at(x, matrix, x_batch_stride, x_row_stride, along, line, WIDTH)
        inside = (along[:, None] < M) & (line[None, :] < vectors_of(lines, WIDTH))
        tl.store(to_x, tl.trans(direction.to(X)), inside)
    else:
        tl.store(x_at(x, matrix, x_batch_stride, x_row_stride, line, along, WIDTH), direction.to(X), inside)


@triton.jit
def _larger(a, b):
    # Not a maximum of the language, which may or may not keep NaN: it is found by the sum.
    return tl.where(a > b, a, b)


@triton.jit(do_not_specialize=["x", "partial", "scale", "norms", "M", "N", "x_batch_stride", "x_row_stride"])
def norm_kernel(
    x, partial, scale, norms, M, N, x_batch_stride: tl.int64, x_row_stride: tl.int64,
    eps: tl.float64, margin: tl.float64, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The scale of a matrix, and its tiles of x brought to one power of two: seldom any has another.

    Every program of a matrix adds all its partial sums, which is less than it costs to wait for another one, and
    rescales its share of the tiles.
    """
    matrix = tl.program_id(0)
    share, shares = tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(N, BLOCK)
    tiles = tl.cdiv(M, BLOCK) * across
    partial += matrix.to(tl.int64) * tiles
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    sums = tl.zeros((CHUNK,), tl.float64)
    largest = tl.zeros((CHUNK,), tl.float64)
    smallest = tl.full((CHUNK,), float("inf"), tl.float64)
    for begin in range(0, tiles, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        square = tl.load(partial + index, index < tiles, 0.0)
        sums += square
        largest = _larger(square, largest)
        smallest = tl.where((square < smallest) & (square != 0), square, smallest)
    total = tl.sum(sums)
    largest = tl.reduce(largest, 0, _larger)
    smallest = -tl.reduce(-smallest, 0, _larger)

    sound = (total > 0) & (total < float("inf"))
    whole = tile_power(largest, HALF)
    if not HALF:
        # csrc/muon_kernels.h: products of an x whose norm is outside [2^-30, 2^30] could overflow or vanish.
        outside = sound & ((total < 2.0**-60) | (total > 2.0**60))
        whole = tl.where(outside, -exponent(tl.sqrt(total)), 0)
    norm = tl.sqrt(tl.where(sound, total, 1.0)) * power(whole)
    e = exponent(norm)
    norm *= power(-e)
    # tl.maximum may be lowered to what ignores a NaN; eps is a number.
    result = 1 / (tl.where(norm > eps, norm, eps) * margin) * power(-e)
    result = tl.where(sound, result, tl.where(total == 0, 0.0, float("nan")))
    if share == 0:
        tl.store(scale + matrix, result.to(tl.float32))
        if norms is not None:
            tl.store(norms + matrix, tl.sqrt(total))
    if sound & ((tile_power(smallest, HALF) != whole) | (tile_power(largest, HALF) != whole)):
        for tile in range(share, tiles, shares):
            square = tl.load(partial + tile)
            e = whole - tile_power(square, HALF)
            if (e != 0) & (square != 0):
                row = tile // across * BLOCK + tl.arange(0, BLOCK)
                col = tile % across * BLOCK + tl.arange(0, BLOCK)
                at = x_at(x, matrix, x_batch_stride, x_row_stride, row, col, 1)
                inside = (row[:, None] < M) & (col[None, :] < N)
                value = tl.load(at, inside, 0.0).to(tl.float32)
                tl.store(at, times_power(value, e).to(x.dtype.element_ty), inside)


def momentum_update(args: MomentumUpdate) -> Tensor:
    """Implement `Backend.momentum_update`, on the current device; x may also be f16. Two launches.

    `scratch` is uint8, batch times `scratch_bytes`, at a multiple of 8: the sums of squares of all tiles, and behind
    them the scales, which are returned.
    """
    x, scratch = args.x, args.scratch
    batch, m, n = x.shape
    if scratch is None:
        scratch = torch.empty(batch * scratch_bytes(m, n), dtype=torch.uint8, device=x.device)
    partial = scratch.view(torch.float64)
    scale = partial[partial.numel() - batch :].view(torch.float32)[:batch]
    if not batch:
        return scale
    tiles = triton.cdiv(m, BLOCK) * triton.cdiv(n, BLOCK)
    assert batch * (tiles + 1) <= partial.numel()
    sizes = m, n, x.stride(0), x.stride(1)
    lists = [args.grad] if args.momentum is None else [args.grad, args.momentum]
    g, *b = (tables.table(matrices, x.device) for matrices in lists)
    if tiles:
        launch(
            momentum_kernel, batch * tiles,
            g.refs, b[0].refs if b else None, x, partial, *sizes, float(args.grad_scale), float(args.mu), 1.0 - args.mu,
            GRAD=TYPES[args.grad[0].tensor.dtype],
            MOMENTUM=TYPES[lists[-1][0].tensor.dtype],
            NESTEROV=args.nesterov,
            DAMPENED=args.dampened,
            WIDTH=tables.width(m, n, max(matrices[0].tensor.itemsize for matrices in lists), x, *b, g),
            BLOCK=BLOCK,
            **OPTIONS,
        )  # fmt: skip
    shares = min(max(tiles // 64, 1), 64)
    launch(
        norm_kernel, (batch, shares), x, partial, scale, args.norm, *sizes, args.eps, args.margin,
        BLOCK=BLOCK, CHUNK=256, **OPTIONS,
    )  # fmt: skip
    return scale


# ---- apply_update ----


@triton.jit
def mixed(z):
    """SplitMix64's output function (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_bits(seed, number, row, col, cols):
    """Sixteen for every element of a whole matrix; csrc/muon_kernels.h says which, at ApplyOptions."""
    STEP: tl.constexpr = 0x9E3779B97F4A7C15
    blocks = ((cols + 1) // 2).to(tl.uint64)  # in two rows
    row, col = row.to(tl.uint64), col.to(tl.uint64)
    state = mixed((seed + number).to(tl.uint64)) + (row // 2 * blocks + col // 2 + 1) * STEP
    return (mixed(state) >> (32 * (row % 2) + 16 * (col % 2))) & 0xFFFF


@triton.jit
def rounded_by(value, random):
    """Up with the probability that makes the mean exact: values that bf16 has stay, as do infinity and NaN."""
    bits = (value.to(tl.uint32, bitcast=True) + random.to(tl.uint32)) >> 16
    return tl.where(value == value, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), value.to(tl.bfloat16))


@triton.jit
def step_factors(lr, weight_decay, lr_at, weight_decay_at, ratio):
    """Return the factors of a parameter and of its update, from numbers of the host or of the device."""
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float64)
    if weight_decay_at is not None:
        weight_decay = tl.load(weight_decay_at).to(tl.float64)
    return tl.cast(1 - lr * weight_decay, tl.float32), tl.cast(lr * ratio, tl.float32)


@triton.jit
def updated(param, update, decay, step_size, CAUTIOUS: tl.constexpr):
    """The new parameter; a cautious one decays only where the update has its sign."""
    decayed = param * decay
    if CAUTIOUS:
        # By the signs: the product of two small numbers would be a zero.
        towards = tl.where(param.to(tl.int32, bitcast=True) < 0, -update, update) >= 0
        decayed = tl.where(towards, decayed, param)
    return tl.fma(-step_size, update, decayed)


@triton.jit(
    do_not_specialize=[
        "x",
        "M",
        "N",
        "x_batch_stride",
        "x_row_stride",
        "lr_at",
        "weight_decay_at",
        "seed",
        "top",
        "left",
        "cols",
        "turned",
    ]
)
def apply_kernel(
    refs, x, ratios, M, N, x_batch_stride: tl.int64, x_row_stride: tl.int64,
    lr: tl.float64, weight_decay: tl.float64, lr_at, weight_decay_at,
    seed: tl.int64, numbers, top: tl.int64, left: tl.int64, cols: tl.int64, turned: tl.int32,
    PARAM: tl.constexpr, CAUTIOUS: tl.constexpr, STOCHASTIC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of a parameter."""
    tiles = tl.cdiv(M, BLOCK) * tl.cdiv(N, BLOCK)
    matrix = tl.program_id(0) // tiles
    param, row_stride, col_stride = matrix_at(refs, matrix, PARAM, WIDTH)
    tall = walks_columns(row_stride, col_stride)
    tile_row, tile_col = tile_of(tl.program_id(0) % tiles, M, N, tall, BLOCK)
    line = tl.where(tall, tile_col, tile_row) * BLOCK + tl.arange(0, BLOCK)
    along = tl.where(tall, tile_row, tile_col) * BLOCK + tl.arange(0, BLOCK)
    lines = tl.where(tall, N, M)
    inside = (line[:, None] < lines) & (along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH))
    if tall:
        from_x = x_at(x, matrix, x_batch_stride, x_row_stride, along, line, WIDTH)
        of_x = (along[:, None] < M) & (line[None, :] < vectors_of(lines, WIDTH))
        update = tl.trans(tl.load(from_x, of_x, 0.0)).to(tl.float32)
    else:
        from_x = x_at(x, matrix, x_batch_stride, x_row_stride, line, along, WIDTH)
        update = tl.load(from_x, inside, 0.0).to(tl.float32)
    at_param = walk(param, row_stride, col_stride, tall, line, along, WIDTH)
    decay, step_size = step_factors(lr, weight_decay, lr_at, weight_decay_at, tl.load(ratios + matrix))
    value = updated(tl.load(at_param, inside, 0.0).to(tl.float32), update, decay, step_size, CAUTIOUS)
    if STOCHASTIC:
        row = tl.where(tall, along[None, :], line[:, None])
        col = tl.where(tall, line[:, None], along[None, :])
        row, col = tl.where(turned != 0, col, row) + top, tl.where(turned != 0, row, col) + left
        tl.store(at_param, rounded_by(value, random_bits(seed, tl.load(numbers + matrix), row, col, cols)), inside)
    else:
        tl.store(at_param, value.to(PARAM), inside)


def on_device(x: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A number for the host, and fp32 on the device if only that knows."""
    if isinstance(x, Tensor):
        return math.nan, x.to(device, torch.float32)
    return float(x), None


def ratios_on(device: torch.device, ratios: Sequence[float]) -> Tensor:
    """Return them as (batch,) float64 on the device."""
    ratios = ratios if isinstance(ratios, array) else array("d", ratios)
    return tables.on_device(ratios.tobytes(), torch.float64, device)


def numbers_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Return them as (batch,) int32 on the device."""
    numbers = numbers if isinstance(numbers, array) else array("i", numbers)
    return tables.on_device(numbers.tobytes(), torch.int32, device)


def apply_update(args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
    """Implement `Backend.apply_update`, on the current device; x may also be f16. One launch.

    Raises:
        ValueError: stochastic rounding of fp16.
    """
    x, dtype = args.x, args.param[0].tensor.dtype if args.param else torch.float32
    batch, m, n = x.shape
    if not x.numel():
        return
    if options.stochastic_rounding and dtype == torch.float16:
        raise ValueError("stochastic_rounding should be of bfloat16 parameters but they are: torch.float16")
    lr, lr_at = on_device(args.lr, x.device)
    weight_decay, weight_decay_at = on_device(args.weight_decay, x.device)
    stochastic, (top, left, cols, turned) = options.stochastic_rounding and dtype == torch.bfloat16, options.window
    numbers = numbers_on(x.device, range(batch) if options.number is None else options.number) if stochastic else None
    p = tables.table(args.param, x.device)
    launch(
        apply_kernel, batch * triton.cdiv(m, BLOCK) * triton.cdiv(n, BLOCK),
        p.refs, x, ratios_on(x.device, args.ratio), m, n, x.stride(0), x.stride(1),
        lr, weight_decay, lr_at, weight_decay_at,
        (options.seed + 2**63) % 2**64 - 2**63, numbers, top, left, n if cols is None else cols, int(turned),
        PARAM=TYPES[dtype],
        CAUTIOUS=options.cautious,
        STOCHASTIC=stochastic,
        WIDTH=tables.width(m, n, dtype.itemsize, x, p),
        BLOCK=BLOCK,
        **OPTIONS,
    )  # fmt: skip
