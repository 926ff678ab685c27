"""Checks that tests and `python -m muon_kernels verify` share: of what must hold on every backend and device.

The judge is float64, in torch's own operations; bounds are those of rounding. A check raises `Wrong`, not by `assert`,
which python -O leaves out. Tensors are made on torch's default device: wrap a check in `with torch.device(...)`.
"""

from __future__ import annotations

from torch import Tensor


class Wrong(AssertionError):
    """Report that a result is not what it must be."""


def require(holds: bool, what: str) -> None:
    """Raise `Wrong` with `what` unless it holds."""
    if not holds:
        raise Wrong(what)


def _at(where: Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())


def agree(out: Tensor, right: Tensor, what: str) -> None:
    """Require equal elements; say how many differ, and the first."""
    differs = out.to(right.dtype) != right  # also where either is NaN
    if differs.any():
        at = _at(differs)
        got, expected = (float(t[at]) for t in (out, right))
        raise Wrong(f"{what}: {int(differs.sum())} of {out.numel()} differ; at {at} expected {expected:g}, got {got:g}")


def within(out: Tensor, right: Tensor, bound: Tensor | float, what: str) -> None:
    """Require |out - right| <= bound for every element; say how many are outside, and the first."""
    error = (out.double() - right).abs()
    outside = ~(error <= bound)  # also where it is NaN
    if outside.any():
        at = _at(outside)
        allowed = float(bound[at]) if isinstance(bound, Tensor) else bound
        raise Wrong(
            f"{what}: {int(outside.sum())} of {out.numel()} are out of bounds; at {at} expected {float(right[at]):g} "
            f"± {allowed:.2g}, got {float(out[at]):g}"
        )
