"""The verbs in plain torch operations: any device, any floating-point dtype, and the twin that native kernels are read
beside. Products run in 16 bits with fp32 accumulation, as in torch.optim.Muon, but batched. A processor without such
instructions multiplies the same operands in fp32: torch's emulation takes up to a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..layout import Matrices
from ..newton_schulz import Square, square


def unavailable() -> str | None:
    """Never: torch is there."""
    return None


def refuses(device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
    """Take any real floating-point dtype on any device."""
    bad = [d for d in dtypes if not d.is_floating_point]
    return f"expected floating-point tensors, got {bad[0]}" if bad else None


def device_types() -> tuple[str, ...]:
    """Any."""
    return ()


def outdone_by(device: torch.device, rows: int, cols: int) -> None:
    """Never by one that "auto" would not have taken before."""


@cache
def emulates(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a 16-bit dtype on such a device without instructions for it.

    Only processors are asked. torch hands 16-bit products to oneDNN where the answer of its operator is yes; that one
    still emulates bf16 on AVX-512 without AVX-512-BF16, which `get_capabilities` tells from torch 2.8 on.
    """
    if device_type != "cpu" or dtype.itemsize != 2:
        return False
    operator = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
    takes: bool = getattr(torch.ops.mkldnn, operator, bool)()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(capabilities.get(name, True) for name in ("avx512_bf16", "amx_bf16"))
    return not takes or (dtype == torch.bfloat16 and not has)


def remarks(device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
    """See `Backend.remarks`."""
    if not emulates(device.type, workspace_dtype):
        return ()
    name = str(workspace_dtype).removeprefix("torch.")
    return (f"eager multiplies {name} operands in float32: this processor has no products of {name}",)


def rehearsal() -> None:
    """torch is ready."""


def describe() -> str:
    """See `Backend.describe`."""
    emulated = [name for name in ("bfloat16", "float16") if emulates("cpu", getattr(torch, name))]
    how = f"; {' and '.join(emulated)} products in float32 on this processor" if emulated else ""
    return f"torch {torch.__version__} operations, batched{how}"


def symmetric_products() -> bool:
    """No: torch has no symmetric product."""
    return False


def precise_squares() -> bool:
    """No: torch's 16-bit products round their result as a whole."""
    return False


def default_workspace_bytes() -> int:
    """1 GiB."""
    return 1 << 30


def leading_dimension(cols: int) -> int:
    """Contiguous."""
    return cols


def normalizes() -> bool:
    """See `Backend.normalizes`."""
    return True


def scratch_bytes(rows: int, cols: int) -> int:
    """None: torch allocates."""
    return 0


def update_launches(count: int) -> int:
    """Counted as one each, however many operations they are."""
    return 2


def product_tiles() -> None:
    """torch chooses."""


def fused_plan(rows: int, cols: int, count: int, schedule: Schedule, stochastic_rounding: bool = False) -> None:
    """No: torch has nothing that runs a whole step."""


def program(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same."""
    return run


def momentum_update(
    grads: Sequence[Matrices],
    momenta: Sequence[Matrices] | None,
    X: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    dampened: bool,
    grad_scale: float,
    eps: float,
    margin: float,
    scratch: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:
    """See `Backend.momentum_update`. Arithmetic in fp32, or in the gradient's dtype if that is wider."""
    start = 0
    for i, grad in enumerate(grads):
        g = grad.view()
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if grad_scale != 1.0:
            g = g * grad_scale
        if momenta is not None:
            buffer = momenta[i].view()
            if buffer.dtype == g.dtype:
                b = buffer.lerp_(g, 1 - momentum) if dampened else buffer.mul_(momentum).add_(g)
            else:
                b = buffer.to(g.dtype)
                b = b.lerp_(g, 1 - momentum) if dampened else b.mul_(momentum).add_(g)
                buffer.copy_(b)
            if not nesterov:
                g = b
            elif dampened:
                g = g.lerp(b, momentum)
            else:
                g = g.add(b, alpha=momentum)
        stop = start + grad.layout.batch
        # Normalised before it is rounded, so that nothing below rounds otherwise than torch.optim.Muon does, and in two
        # factors: the reciprocal norm alone may be outside fp32's range.
        norm = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.float64, keepdim=True)
        if norms is not None:
            norms[start:stop].copy_(norm[:, 0, 0])
        mantissa, exponent = torch.frexp(norm)
        sound = norm.isfinite() & (norm > 0)
        half = exponent.where(sound, 0) // 2
        first = torch.ldexp(torch.ones_like(norm), -half)
        second = torch.ldexp(1 / (mantissa.where(sound, 1) * margin), half - exponent.where(sound, 0))
        X[start:stop].copy_((g * first.to(g.dtype)).mul_(second.to(g.dtype)))
        start = stop


def _multiply(A: Tensor, B: Tensor, out: Tensor, C: Tensor | None, alpha: float, beta: float) -> None:
    """out = alpha·A·B + beta·C, summed in fp32 and rounded once."""
    if not emulates(out.device.type, out.dtype):
        torch.baddbmm(out if C is None else C, A, B, beta=0 if C is None else beta, alpha=alpha, out=out)
        return
    total = torch.bmm(A.float(), B.float()).mul_(alpha)
    out.copy_(total.add_(C, alpha=beta) if C is not None and beta else total)


def _product(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    C: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    scale: Tensor | None,
) -> None:
    if gamma:  # the identity must not be added to a rounded sum: in fp32, which torch's product cannot return
        rounded = torch.empty_like(out)
        _multiply(A, B, rounded, None, 1.0, 0.0)
        total = rounded.float().mul_(alpha)
        if C is not None:
            total.add_(C, alpha=beta)
        total.diagonal(dim1=-2, dim2=-1).add_(gamma)
    elif alpha == 0:  # on the CPU, torch 2.13 then takes beta for 0 too, or writes nothing
        total = torch.zeros_like(out) if C is None else C.float() * beta
    else:
        _multiply(A, B, out, C, alpha, beta)
        if scale is None:
            return
        total = out.float()
    out.copy_(total if scale is None else total.mul_(scale[:, None, None]))


def then(run: Callable[[], object], operands: Sequence[Tensor]) -> None:
    """See `Products.then`."""
    run()


def syrk(
    A: Tensor | Square,
    *,
    out: Square,
    C: Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """See `Products.syrk`."""
    A, squared = square(A).high, None if scale is None else scale * scale
    _product(A, A.mT, out.high, None if C is None else C.high, alpha, beta, gamma, squared)


def syrkx(A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
    """See `Products.syrkx`."""
    _product(A.high, B.high, out.high, None, 1.0, 0.0, gamma, None)


def gemm(
    A: Square,
    X: Tensor | Square,
    *,
    out: Tensor | Square,
    C: Tensor | Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """See `Products.gemm`."""
    addend = None if C is None else square(C).high
    _product(A.high, square(X).high, square(out).high, addend, alpha, beta, gamma, scale)


def _towards_zero(p: Tensor, update: Tensor) -> Tensor:
    """Where the update has the parameter's sign, or is zero. By the signs: a product may underflow to a zero."""
    return update * torch.ones_like(p).copysign_(p) >= 0


def _logical_shift(z: Tensor, bits: int | Tensor) -> Tensor:
    """z >> bits, 0 < bits, of 64 bits without a sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014), int64 for 64 bits without a sign."""
    z = (z ^ _logical_shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _logical_shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _logical_shift(z, 31)


def _random_bits(seed: int, first: int, X: Tensor) -> Tensor:
    """Sixteen for every element of X, int64: RandomBits of csrc/cpu/elementwise.h."""
    batch, m, n = X.shape
    down, across = (m + 1) // 2, (n + 1) // 2
    begin = _mixed(torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device="cpu")).item()
    numbers = first * down * across + 1, (first + batch) * down * across + 1
    block = torch.arange(*numbers, dtype=torch.int64, device=X.device)
    mixed = _mixed(block * (0x9E3779B97F4A7C15 - 2**64) + begin).view(batch, down, 1, across, 1)
    of_element = torch.tensor([[[0, 16]], [[32, 48]]], dtype=torch.int64, device=X.device)
    return ((mixed >> of_element) & 0xFFFF).reshape(batch, 2 * down, 2 * across)[:, :m, :n]


def _round_stochastically(value: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16; up with the probability that makes the mean exact. NaN stays."""
    rounded = ((value.view(torch.int32) + random.int()) >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded.where(~value.isnan(), torch.nan)


def _fp32(x: float | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32, device=device)


def add(
    A: Square,
    *,
    out: Square,
    C: Square | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scale: Tensor | None = None,
) -> None:
    """See `Products.add`; for the GPU backends too."""
    on_diagonal = None
    if gamma or out.diagonal is not None:
        on_diagonal = alpha * _diagonal(A) + (gamma if C is None else gamma + beta * _diagonal(C))
        if scale is not None:
            on_diagonal *= scale[:, None]
    if C is None:
        torch.mul(A.high, alpha if scale is None else (alpha * scale)[:, None, None], out=out.high)
    elif C.high is out.high and beta == 1 and scale is None:
        out.high.add_(A.high, alpha=alpha)
    else:
        total = torch.add(beta * C.high.float(), A.high, alpha=alpha)
        out.high.copy_(total if scale is None else total.mul_(scale[:, None, None]))
    if on_diagonal is not None:
        rounded = out.high.diagonal(dim1=1, dim2=2)
        rounded.copy_(on_diagonal)
        if out.diagonal is not None:
            torch.sub(on_diagonal, rounded.float(), out=out.diagonal)


def _diagonal(S: Square) -> Tensor:
    on_diagonal = S.high.diagonal(dim1=1, dim2=2).float()
    return on_diagonal if S.diagonal is None else on_diagonal + S.diagonal


def _step_size(lr: float | Tensor, ratios: Sequence[float], like: Tensor) -> float | Tensor:
    """(matrices, 1, 1) where they have several; second moments make them differ within a parameter."""
    if ratios.count(ratios[0]) == len(ratios):
        return lr * ratios[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    return lr * torch.tensor(ratios, dtype=dtype, device=like.device).view(-1, 1, 1)


def apply_update(
    params: Sequence[Matrices],
    X: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    ratios: Sequence[float],
    cautious: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    first: int = 0,
) -> None:
    """See `Backend.apply_update`. Arithmetic in the parameter's dtype; before stochastic rounding in fp32, fused."""
    start, decay = 0, 1 - lr * weight_decay
    for param in params:
        stop = start + param.layout.batch
        p, update, step_size = param.view(), X[start:stop], _step_size(lr, ratios[start:stop], param.tensor)
        if stochastic_rounding and p.dtype == torch.bfloat16:
            value = p.float()
            decayed = value * _fp32(decay, X.device)
            if cautious:
                decayed = decayed.where(_towards_zero(p, update), value)
            value = (decayed.double() - update.double() * _fp32(step_size, X.device).double()).float()
            p.copy_(_round_stochastically(value, _random_bits(seed, first + start, update)))
            start = stop
            continue
        if cautious:
            p.copy_((p * decay).where(_towards_zero(p, update), p))
        else:
            p.mul_(decay)
        if isinstance(step_size, Tensor):
            p.sub_(update * step_size)
        else:
            p.add_(update, alpha=-step_size)
        start = stop
