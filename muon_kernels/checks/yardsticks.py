"""Yardsticks: the iteration in float64, and torch's own loop, which errors are measured by.

torch rounds to bf16 what it multiplies in bf16, with sums in fp32. Products in fp32 of the same operands, rounded
afterwards, are these numbers up to the order of the sums, and take a hundredth of the time where a processor has no
instructions for bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..coefficients import Schedule


def newton_schulz(X: Tensor, schedule: Schedule) -> Tensor:
    """Return the iteration on (..., m, n) in float64."""
    tall = X.shape[-2] > X.shape[-1]
    X = X.double().mT if tall else X.double()
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = X / (schedule.margin * norm.where(norm != 0, 1.0))
    for a, b, c in schedule.triples:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def bf16_loop(G: Tensor, schedule: Schedule, norm_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return torch.optim.Muon's loop on (..., m, n), with coefficients that may differ by step."""
    X = G.bfloat16()
    X = X.mT if G.shape[-2] > G.shape[-1] else X
    norm = X.to(norm_dtype).norm(dim=(-2, -1), keepdim=True)
    X = _rounded(X / (norm * schedule.margin).clamp(min=1e-7))
    for a, b, c in schedule.triples:
        A = _rounded(X @ X.mT)
        B = _rounded(b * A + c * (A @ A))
        X = _rounded(a * X + B @ X)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).bfloat16()


def relative_error(X: Tensor, truth: Tensor) -> float:
    """Return the Frobenius norm of the error, relative to the truth's."""
    return float((X.double() - truth).norm() / truth.norm())
