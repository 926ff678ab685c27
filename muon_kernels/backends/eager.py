"""The verbs in plain torch operations: any device, any floating-point dtype, and the twin that native kernels are read
beside. Products run in 16 bits with fp32 accumulation, as in torch.optim.Muon, but batched. A processor without such
instructions multiplies the same operands in fp32: torch's emulation takes up to a hundred times as long.

Torch's operations round their last bits by how operands lie in memory, so those of a step depend on strides. What an
operation needs beside its operands is taken from memory.py, but for what torch's 16-bit product takes inside itself.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..coefficients import Schedule
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate
from . import eager_products
from .eager_products import add as add
from .eager_products import gemm as gemm
from .eager_products import groups
from .eager_products import syrk as syrk
from .eager_products import syrkx as syrkx
from .eager_products import then as then

# Facts, see `Backend`.
device_types: tuple[str, ...] = ()  # any
symmetric_products = False  # torch has none
precise_squares = False  # torch's 16-bit products round their result as a whole
normalizes = True
default_workspace_bytes = 1 << 30


def unavailable() -> str | None:
    """Return None: torch is there."""
    return None


def refuses(device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
    """Take any real floating-point dtype on any device."""
    bad = [d for d in dtypes if not d.is_floating_point]
    return f"expected floating-point tensors, got {bad[0]}" if bad else None


def prefers_instead(device: torch.device, rows: int, cols: int) -> None:
    """Return None: "auto" has asked the faster ones before."""


def remarks(device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
    """Implement `Backend.remarks`."""
    if not eager_products.emulates(device.type, workspace_dtype):
        return ()
    name = str(workspace_dtype).removeprefix("torch.")
    return (f"eager multiplies {name} operands in float32: this processor has no products of {name}",)


def rehearsal() -> AbstractContextManager[None]:
    """Return a context that takes memory; see memory.py."""
    return memory.rehearsal()


def describe() -> str:
    """Implement `Backend.describe`."""
    emulated = [name for name in ("bfloat16", "float16") if eager_products.emulates("cpu", getattr(torch, name))]
    how = f"; {' and '.join(emulated)} products in float32 on this processor" if emulated else ""
    return f"torch {torch.__version__} operations, batched{how}"


def leading_dimension(cols: int) -> int:
    """Return `cols`: stacks are contiguous."""
    return cols


def scratch_bytes(rows: int, cols: int) -> int:
    """Return 0: memory.py has it."""
    return 0


def update_launches(count: int) -> int:
    """Count one each, however many operations they are."""
    return 2


def product_tiles() -> None:
    """Return None: torch chooses."""


def fused_plan(
    rows: int,
    cols: int,
    count: int,
    schedule: Schedule,
    stochastic_rounding: bool = False,
    room: int | None = None,
) -> None:
    """Return None: torch has nothing that runs a whole step."""


def program(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return `run` itself."""
    return run


def momentum_update(args: MomentumUpdate) -> None:
    """Implement `Backend.momentum_update`. Arithmetic in fp32, or in the gradient's dtype if that is wider."""
    start = 0
    for i, matrices in enumerate(args.grad):
        all_of, buffers = matrices.view(), None if args.momentum is None else args.momentum[i].view()
        for at in groups(all_of):
            grad, buffer = all_of[at], None if buffers is None else buffers[at]
            here = slice(start, start + len(grad))
            start = here.stop
            wide, one = torch.promote_types(grad.dtype, torch.float32), (len(grad), 1, 1)
            value, moved, precise, norm, *beside = memory.take(
                grad.device,
                *[(grad.shape, wide)] * 2,
                (grad.shape, torch.float64),
                *[(one, dtype) for dtype in (torch.float64, *_NUMBERS, wide)],
            )
            if memory.rehearsing():
                continue
            g = _direction(args, grad, buffer, value, moved)
            g64 = g if g.dtype == torch.float64 else precise.copy_(g)
            torch.linalg.vector_norm(g64, dim=(-2, -1), keepdim=True, out=norm)
            if args.norm is not None:
                args.norm[here].copy_(norm[:, 0, 0])
            args.x[here].copy_(_normalized(g, norm, args.margin, value, beside))


def _direction(args: MomentumUpdate, grad: Tensor, buffer: Tensor | None, value: Tensor, moved: Tensor) -> Tensor:
    """Update the momentum; the direction may be the gradient, the momentum, `value` or `moved`, memory for both."""
    g = grad if grad.dtype == value.dtype else value.copy_(grad)
    if args.grad_scale != 1.0:
        g = torch.mul(g, args.grad_scale, out=value)
    if buffer is None:
        return g
    b = buffer if buffer.dtype == g.dtype else moved.copy_(buffer)
    if args.dampened:
        b.lerp_(g, 1 - args.mu)
    else:
        b.mul_(args.mu).add_(g)
    if b is moved:
        buffer.copy_(b)
    if not args.nesterov:
        return b
    return torch.lerp(g, b, args.mu, out=value) if args.dampened else torch.add(g, b, alpha=args.mu, out=value)


# What `_normalized` needs of each matrix beside its norm.
_NUMBERS = (torch.float64, torch.int32, torch.int64, torch.int64, torch.int64, torch.bool, torch.bool)


def _normalized(g: Tensor, norm: Tensor, margin: float, value: Tensor, beside: Sequence[Tensor]) -> Tensor:
    """g / (margin · norm) in `value`, before it is rounded, so that nothing below rounds otherwise than torch's Muon.

    In two factors: the reciprocal norm alone may be outside fp32's range. A norm of zero, or none, counts as 1.
    """
    mantissa, exponent, whole, half, power, sound, finite, factor = beside
    torch.frexp(norm, out=(mantissa, exponent))
    torch.gt(norm, 0, out=sound).logical_and_(torch.lt(norm, math.inf, out=finite))
    mantissa.masked_fill_(sound.logical_not_(), 1.0)
    whole.copy_(exponent.masked_fill_(sound, 0))
    torch.div(whole, 2, rounding_mode="floor", out=half)
    torch.mul(g, factor.copy_(_power_of_two(torch.neg(half, out=power))), out=value)
    mantissa.mul_(margin).reciprocal_().mul_(_power_of_two(torch.sub(half, whole, out=power)))
    return value.mul_(factor.copy_(mantissa))


def _power_of_two(exponents: Tensor) -> Tensor:
    """Doubles in the place of their exponents, int64."""
    return exponents.add_(1023).bitwise_left_shift_(52).view(torch.float64)


def apply_update(args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
    """Implement `Backend.apply_update`. Arithmetic in the parameter's dtype; fp32 before stochastic rounding."""
    start, decay = 0, 1 - args.lr * args.weight_decay
    for param in args.param:
        for at in groups(param.view()):
            p = param.view()[at]
            here = slice(start, start + len(p))
            start = here.stop
            x, step_sizes = args.x[here], _StepSizes(args.lr, args.ratio[here])
            if options.stochastic_rounding and p.dtype == torch.bfloat16:
                numbers = range(len(args.x)) if options.number is None else options.number
                _update_stochastically(p, x, step_sizes, decay, options, numbers[here])
            else:
                _update(p, x, step_sizes, decay, options.cautious)


class _StepSizes(NamedTuple):
    """Step sizes lr·ratio of matrices; second moments make ratios differ within a parameter."""

    lr: float | Tensor
    ratios: Sequence[float]

    def of(self, spare: Tensor) -> float | Tensor:
        """One for all of them, or every matrix's in `spare`, (batch, 1, 1)."""
        ratios = self.ratios if isinstance(self.ratios, array) else array("d", self.ratios)
        if ratios.count(ratios[0]) == len(ratios):
            return self.lr * ratios[0]
        return spare.copy_(torch.frombuffer(ratios, dtype=torch.float64).view(-1, 1, 1)).mul_(self.lr)


def _update(p: Tensor, X: Tensor, step_sizes: _StepSizes, decay: float | Tensor, cautious: bool) -> None:
    wide = torch.promote_types(torch.promote_types(p.dtype, X.dtype), torch.float32)
    update, value, decayed, kept, *towards, spare = memory.take(
        p.device,
        *[(p.shape, wide)] * 2,
        *[(p.shape, p.dtype)] * 2,
        *[(p.shape, torch.bool)] * 3,
        ((len(p), 1, 1), torch.promote_types(p.dtype, torch.float32)),
    )
    if memory.rehearsing():
        return
    if cautious:
        torch.mul(p, decay, out=decayed)
        p.copy_(torch.where(_towards_zero(p, X, towards), decayed, p, out=kept))
    else:
        p.mul_(decay)
    step_size = step_sizes.of(spare)
    if isinstance(step_size, Tensor):
        update.copy_(X).mul_(step_size)
        if step_size.ndim == 0:  # the product of two of torch's dtypes has the stack's
            update.copy_(kept.copy_(update))
        step_size = 1.0
    elif p.dtype == X.dtype:
        p.add_(X, alpha=-step_size)
        return
    else:
        update.copy_(X)
    if p.dtype == wide:
        p.add_(update, alpha=-step_size)
    else:
        p.copy_(value.copy_(p).add_(update, alpha=-step_size))


def _update_stochastically(
    p: Tensor,
    X: Tensor,
    step_sizes: _StepSizes,
    decay: float | Tensor,
    options: ApplyOptions,
    numbers: Sequence[int],
) -> None:
    batch, (top, left, cols, turned) = len(p), options.window
    m, n = reversed(p.shape[1:]) if turned else p.shape[1:]  # as the whole matrix has them
    above, before = top % 2, left % 2  # in the first blocks
    down, across = (above + m + 1) // 2, (before + n + 1) // 2
    value, decayed, precise, update, whole, rounded, *towards, spare, sizes, states, rows, columns, z, shifted, bits = (
        memory.take(
            p.device,
            *[(p.shape, torch.float32)] * 2,
            *[(p.shape, torch.float64)] * 2,
            (p.shape, torch.int32),
            (p.shape, torch.int16),
            *[(p.shape, torch.bool)] * 3,
            *[((batch, 1, 1), dtype) for dtype in (torch.float32, torch.float64, torch.int64)],
            *[((count,), torch.int64) for count in (down, across)],
            *[((batch, down, across), torch.int64)] * 2,
            ((batch, down, 2, across, 2), torch.int64),
        )
    )
    if memory.rehearsing():
        return
    torch.mul(value.copy_(p), decay, out=decayed)
    precise.copy_(decayed)
    if options.cautious:
        precise.copy_(torch.where(_towards_zero(p, X, towards), decayed, value, out=whole.view(torch.float32)))
    step_size = step_sizes.of(spare)
    step_size = sizes.copy_(step_size) if isinstance(step_size, Tensor) else array("f", [step_size])[0]
    # As if with one rounding, to fp32.
    value.copy_(precise.sub_(update.copy_(X).mul_(step_size)))
    mixed = [_signed(_mixed((options.seed + number) % 2**64)) for number in numbers]
    states.copy_(torch.frombuffer(array("q", mixed), dtype=torch.int64).view(-1, 1, 1))
    in_two_rows = ((p.shape[2] if cols is None else cols) + 1) // 2
    first = top // 2 * in_two_rows + left // 2
    _random_bits(states, first, in_two_rows, rows, columns, z, shifted, bits)
    own = bits.view(batch, 2 * down, 2 * across)[:, above : above + m, before : before + n]
    whole.copy_(own.mT if turned else own)
    # Up with the probability that makes the mean exact. NaN stays.
    rounded.copy_(whole.add_(value.view(torch.int32)).bitwise_right_shift_(16))
    p.copy_(rounded.view(torch.bfloat16).masked_fill_(torch.ne(value, value, out=towards[0]), math.nan))


def _towards_zero(p: Tensor, update: Tensor, spare: Sequence[Tensor]) -> Tensor:
    """Return where the update has the parameter's sign or is zero. It compares signs: a product may underflow."""
    negative, up, down = spare
    torch.signbit(p, out=negative)
    torch.le(update, 0, out=down).logical_and_(negative)
    return torch.ge(update, 0, out=up).logical_and_(negative.logical_not_()).logical_or_(down)


_MIX = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_STRIDE = 0x9E3779B97F4A7C15


def _mixed(z: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood 2014)."""
    z = (z ^ z >> 30) * _MIX[0] % 2**64
    z = (z ^ z >> 27) * _MIX[1] % 2**64
    return z ^ z >> 31


def _signed(z: int) -> int:
    """Return the int64 that has the bits of an unsigned number."""
    return (z + 2**63) % 2**64 - 2**63


def _random_bits(
    states: Tensor,
    first: int,
    in_two_rows: int,
    rows: Tensor,
    columns: Tensor,
    z: Tensor,
    shifted: Tensor,
    bits: Tensor,
) -> None:
    """Write sixteen for every element; csrc/muon_kernels.h says which, at ApplyOptions.

    Args:
        states: (batch, 1, 1) int64, where the streams of the matrices begin.
        first: number of the first block of 2 x 2 elements in the whole matrix.
        in_two_rows: number of blocks in two rows of that.
        rows, columns: (down,) and (across,) int64, overwritten.
        z, shifted: (batch, down, across) int64, one number a block; overwritten.
        bits: (batch, down, 2, across, 2) int64, written.
    """
    torch.arange(z.shape[1], out=rows, device=z.device)
    torch.arange(first + 1, first + 1 + z.shape[2], out=columns, device=z.device)
    z.copy_(columns).add_(rows.mul_(in_two_rows)[:, None])
    z.mul_(_signed(_STRIDE)).add_(states)
    for shift, factor in zip((30, 27, 31), (*_MIX, 1), strict=True):  # `_mixed`
        z.bitwise_xor_(_logically_shifted(z, shift, shifted)).mul_(_signed(factor))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        bits[:, :, row, :, column].copy_(torch.bitwise_right_shift(z, 32 * row + 16 * column, out=shifted))
    bits.bitwise_and_(0xFFFF)


def _logically_shifted(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """z >> bits, 0 < bits, of 64 bits without a sign."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)
