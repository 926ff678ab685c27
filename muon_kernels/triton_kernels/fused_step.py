"""A whole Muon step of small matrices in one launch, a program a matrix.

X streams through twice, once for the momentum and R = X Xᵀ, once for the update; the iteration, in its Gram form,
never leaves the chip. The Gram form multiplies X by a polynomial of R, and what rounding does to a small eigenvalue of
R grows with the square of every `a` that follows: in bf16 it would need a visit to X every other step. Here every
number is a sum of three bf16 numbers and a product six on the tensor cores, of any vendor, and R, Q and S stay in
fp32: enough for five to eight steps (see `refuses`).
"""

from __future__ import annotations

from array import array
from itertools import chain

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from ..verbs import Step
from . import tables
from .configs import FUSED_ROWS, block_of
from .elementwise import (
    TYPES,
    blend,
    look_ahead,
    matrix_at,
    on_device,
    ratios_on,
    step_factors,
    updated,
    vectors_of,
    walk,
    walks_columns,
)
from .launch import launch


@triton.jit
def power(e):
    """2^e in fp32, -126 ≤ e ≤ 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent(v):
    """floor(log2(v)) of a normal number that is not negative; 128 for infinity and NaN, -127 for what is too small."""
    return (v.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def split(v):
    """Three bf16 numbers whose sum is v, the largest first."""
    high = v.to(tl.bfloat16)
    v -= high.to(tl.float32)
    middle = v.to(tl.bfloat16)
    return high, middle, (v - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, TERMS: tl.constexpr):
    """a · b, where a number is the sum of two or three of bf16: to 16 or 22 bits. The smallest products come first, and
    only one term of b occupies registers at a time."""
    a0, a1, a2 = split(a)
    b0, b1, b2 = split(b)
    if TERMS == 3:
        c = tl.dot(a0, b2)
        c = tl.dot(a1, b1, c)
        c = tl.dot(a0, b1, c)
        c = tl.dot(a2, b0, c)
    else:
        c = tl.dot(a0, b1)
    c = tl.dot(a1, b0, c)
    return tl.dot(a0, b0, c)


@triton.jit
def exchanged(exchange, a, b):
    """Return (a, b) or (b, a)."""
    if exchange:
        a, b = b, a
    return a, b


@triton.jit
def turned(x, tall, WIDTH: tl.constexpr):
    """The transpose of a square tile, if it was walked along columns. Not by a branch: what follows would be there
    twice, in other layouts."""
    return tl.where(tall, tl.trans(x), x) if WIDTH > 1 else x


@triton.jit
def direction_of(grad, momentum, mu, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DAMPENED: tl.constexpr):
    """Return the direction from a gradient times its scale and the new momentum."""
    if not HAS_MOMENTUM:
        return grad
    return look_ahead(grad, momentum, mu, DAMPENED) if NESTEROV else momentum


@triton.constexpr_function
def columns_of(width, block):
    """Return the columns of a tile, half where single elements are moved: their addresses take many registers."""
    return block if width > 1 else 32


@triton.jit
def tile_at(origin, begin, M, N, tall, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Lines, places along them and what is inside a matrix, of the tile whose first column is `begin`."""
    line = tl.arange(0, BLOCK) + (origin + tl.where(tall, begin, 0))
    along = tl.arange(0, columns_of(WIDTH, BLOCK)) + (origin + tl.where(tall, 0, begin))
    inside = (line[:, None] < tl.where(tall, N, M)) & (along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH))
    return line, along, inside


@triton.jit
def is_tall(param_refs, matrix, WIDTH: tl.constexpr):
    """Return whether a matrix is walked along its columns; it does not matter where elements are moved one by one."""
    return WIDTH > 1 and walks_columns(tl.load(param_refs + 3 * matrix + 1), tl.load(param_refs + 3 * matrix + 2))


@triton.jit
def first_pass(
    grad_refs, momentum_refs, tall, M, N, grad_scale, mu, rest,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DAMPENED: tl.constexpr,
    TERMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the momentum. R = (X 2^-e)(X 2^-e)ᵀ for an X of any scale, and e, that of its largest element."""
    matrix = tl.program_id(0)
    grad, grad_row, grad_col = matrix_at(grad_refs, matrix, GRAD, WIDTH)
    if momentum_refs is not None:
        momentum, momentum_row, momentum_col = matrix_at(momentum_refs, matrix, MOMENTUM, WIDTH)
    R = tl.zeros((BLOCK, BLOCK), tl.float32)
    largest = -126
    for begin in range(0, N, columns_of(WIDTH, BLOCK)):
        line, along, inside = tile_at(0, begin, M, N, tall, WIDTH, BLOCK)
        from_grad = walk(grad, grad_row, grad_col, tall, line, along, WIDTH)
        g = tl.load(from_grad, inside, 0.0).to(tl.float32) * grad_scale
        new = g
        if momentum_refs is not None:
            at = walk(momentum, momentum_row, momentum_col, tall, line, along, WIDTH)
            # What the buffer holds, after its rounding: the second pass reads the same.
            stored = blend(g, tl.load(at, inside, 0.0).to(tl.float32), mu, rest, DAMPENED).to(MOMENTUM)
            tl.store(at, stored, inside)
            new = stored.to(tl.float32)
        x = direction_of(g, new, mu, momentum_refs is not None, NESTEROV, DAMPENED)
        own = tl.minimum(tl.max(exponent(tl.abs(x))), 126)
        x = turned(x * power(-own), tall, WIDTH)
        # The factors of the tile keep the sum out of the tensor cores' accumulator, where long sums drift.
        before, largest = largest, tl.maximum(largest, own)
        shrink, of_tile = power(tl.maximum(before - largest, -126)), power(tl.maximum(own - largest, -126))
        R = R * shrink * shrink + product(x, tl.trans(x), TERMS) * of_tile * of_tile
    return R, largest


@triton.jit
def newton_schulz(R, coefficients, steps, zero, eps, margin, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Iterate from R to Q, which has the scale of X in it; `coefficients` is (steps, 3), on the device."""
    diagonal = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    trace = tl.sum(tl.where(diagonal, R, 0.0))
    norm = tl.sqrt_rn(trace)
    least = eps * power(exponent(norm))
    scale = tl.div_rn(1.0, tl.where(norm > least, norm, least) * margin)
    scale = tl.where(trace < float("inf"), tl.where(trace == 0, 0.0, scale), float("nan"))
    R *= scale * scale
    Q = R
    for step in range(steps):
        of_step = coefficients + 3 * step
        a, b, c = tl.load(of_step), tl.load(of_step + 1), tl.load(of_step + 2)
        # The identity goes in before anything is rounded.
        S = tl.fma(product(R, R, TERMS), c, tl.fma(R, b, tl.where(diagonal, a, 0.0)))
        # Q S, R S and (R S) S share their code: each would load all of S into registers, and keep it for the others.
        # The first Q is scale S, and there is no use for the last R.
        begin, end = zero + tl.where(step == 0, 1, 0), tl.where(step == steps - 1, 1, 3)
        left, other = exchanged(step == 0, tl.where(step == 0, scale * S, Q), R)
        for turn in range(begin, end):
            left, other = exchanged(turn == 0, product(left, S, TERMS), other)
        R, Q = left, other
    return Q


@triton.jit
def second_pass(
    Q, largest, grad_refs, momentum_refs, param_refs, tall, zero, M, N, grad_scale, mu, decay, step_size,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, PARAM: tl.constexpr, NESTEROV: tl.constexpr, DAMPENED: tl.constexpr,
    CAUTIOUS: tl.constexpr, TERMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parameter moves by Q X 2^-largest."""
    matrix = tl.program_id(0)
    for begin in range(0, N, columns_of(WIDTH, BLOCK)):
        # Read for every tile: addresses that wait for the next one would need registers that the product has.
        grad, grad_row, grad_col = matrix_at(grad_refs, matrix, GRAD, WIDTH)
        param, param_row, param_col = matrix_at(param_refs, matrix, PARAM, WIDTH)
        if momentum_refs is not None:
            momentum, momentum_row, momentum_col = matrix_at(momentum_refs, matrix, MOMENTUM, WIDTH)
        line, along, inside = tile_at(zero * BLOCK, begin, M, N, tall, WIDTH, BLOCK)
        g = 0.0
        if momentum_refs is None or NESTEROV:
            from_grad = walk(grad, grad_row, grad_col, tall, line, along, WIDTH)
            g = tl.load(from_grad, inside, 0.0).to(tl.float32) * grad_scale
        new = g
        if momentum_refs is not None:
            from_momentum = walk(momentum, momentum_row, momentum_col, tall, line, along, WIDTH)
            new = tl.load(from_momentum, inside, 0.0).to(tl.float32)
        x = direction_of(g, new, mu, momentum_refs is not None, NESTEROV, DAMPENED) * power(-largest)
        update = turned(product(Q, turned(x, tall, WIDTH), TERMS), tall, WIDTH)
        at = walk(param, param_row, param_col, tall, line, along, WIDTH)
        value = updated(tl.load(at, inside, 0.0).to(tl.float32), update, decay, step_size, CAUTIOUS)
        tl.store(at, value.to(PARAM), inside)


@triton.jit(do_not_specialize=["steps", "zero", "M", "N", "lr_at", "weight_decay_at"])
def fused_step_kernel(
    grad_refs, momentum_refs, param_refs, ratios, coefficients, steps, zero, M, N, grad_scale: tl.float32,
    mu: tl.float32, rest: tl.float32, eps: tl.float32, margin: tl.float32,
    lr: tl.float64, weight_decay: tl.float64, lr_at, weight_decay_at,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, PARAM: tl.constexpr, NESTEROV: tl.constexpr, DAMPENED: tl.constexpr,
    CAUTIOUS: tl.constexpr, TERMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A matrix of M ≤ BLOCK rows. Its tiles are square: walked along columns, one only has to be transposed.

    zero: 0, which the compiler does not know. It unrolls no loop that begins there, and computes no index that has it
    before the iteration, which needs every register.
    """
    matrix = tl.program_id(0)
    R, largest = first_pass(
        grad_refs, momentum_refs, is_tall(param_refs, matrix, WIDTH), M, N, grad_scale, mu, rest,
        GRAD, MOMENTUM, NESTEROV, DAMPENED, TERMS, WIDTH, BLOCK,
    )  # fmt: skip
    Q = newton_schulz(R, coefficients, steps, zero, eps, margin, TERMS, BLOCK)
    decay, step_size = step_factors(lr, weight_decay, lr_at, weight_decay_at, tl.load(ratios + matrix))
    # A thread may read momenta that another one has written.
    tl.debug_barrier()
    second_pass(
        Q, largest, grad_refs, momentum_refs, param_refs, is_tall(param_refs, matrix, WIDTH), zero, M, N, grad_scale,
        mu, decay, step_size, GRAD, MOMENTUM, PARAM, NESTEROV, DAMPENED, CAUTIOUS, TERMS, WIDTH, BLOCK,
    )  # fmt: skip


def _registers() -> dict[str, int]:
    """Options without which compilers spill: all registers that there are, tensor instructions with small results."""
    if knobs.runtime.interpret:
        return {}
    options = {"cuda": {"maxnreg": 255}, "hip": {"matrix_instr_nonkdim": 16}}
    return options.get(driver.active.get_current_target().backend, {})


def fused_step(args: Step, terms: int) -> None:
    """Implement `Backend.fused_step`, on the current device, in one launch.

    Args:
        args: its momentum's x gives the sizes, wide side up; momenta may be None.
        terms: of bf16 that a number is the sum of in the iteration, two or three.

    Raises:
        ValueError: more than FUSED_ROWS rows, stochastic rounding.
    """
    momentum, apply, options = args.momentum, args.apply, args.options
    _, m, n = momentum.x.shape
    if m > min(n, FUSED_ROWS):
        raise ValueError(f"fused_step takes wide matrices of at most {FUSED_ROWS} rows but they are: {m} x {n}")
    if options.stochastic_rounding:
        raise ValueError("fused_step rounds to nearest but was asked for: stochastic_rounding")
    if not (len(apply.ratio) and m):
        return
    device = apply.param[0].tensor.device
    lr, lr_at = on_device(apply.lr, device)
    weight_decay, weight_decay_at = on_device(apply.weight_decay, device)
    lists = (
        [apply.param, momentum.grad] if momentum.momentum is None else [apply.param, momentum.grad, momentum.momentum]
    )
    p, g, *b = (tables.table(matrices, device) for matrices in lists)
    coefficients = array("f", chain.from_iterable(args.triples)).tobytes()
    launch(
        fused_step_kernel, len(apply.ratio),
        g.refs, b[0].refs if b else None, p.refs, ratios_on(device, apply.ratio),
        tables.on_device(coefficients, torch.float32, device), len(args.triples), 0, m, n,
        float(momentum.grad_scale), float(momentum.mu), 1.0 - momentum.mu, float(momentum.eps), float(momentum.margin),
        lr, weight_decay, lr_at, weight_decay_at,
        GRAD=TYPES[momentum.grad[0].tensor.dtype],
        MOMENTUM=TYPES[lists[-1][0].tensor.dtype],
        PARAM=TYPES[apply.param[0].tensor.dtype],
        NESTEROV=momentum.nesterov,
        DAMPENED=momentum.dampened,
        CAUTIOUS=options.cautious,
        WIDTH=tables.width(m, n, max(matrices[0].tensor.itemsize for matrices in lists), None, p, g, *b),
        TERMS=terms,
        BLOCK=block_of(m),
        num_stages=1,
        num_warps=block_of(m) // 16,  # each has 16 rows; more would do the same once again
        **_registers(),
        enable_fp_fusion=False,
    )  # fmt: skip
