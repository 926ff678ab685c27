"""Quantities of a spectrum: how flat the singular values of matrices are, and how large their elements."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """Quantities that `summary` computes, each of shape (...) and in float64."""

    svd_entropy: Tensor
    effective_rank: Tensor
    stable_rank: Tensor
    condition: Tensor
    rms: Tensor


QUANTITIES = Summary._fields


def svd_entropy(W: Tensor) -> Tensor:
    """Measure how evenly the energy of each matrix is spread over its n = min(rows, cols) singular values σ:

        H = -1 / log n · Σ pᵢ log pᵢ    with    pᵢ = σᵢ² / Σ σⱼ²

    It lies between 0, for rank one, and 1, for a flat spectrum.

    Args:
        W: (..., rows, cols), of any floating dtype; only read. This module computes on its device and in float64.

    Returns:
        (...), float64. A matrix with one singular value, whose spectrum is flat, has 1; a zero matrix, or one without
        elements, 0; one with NaN or infinity, NaN.

    Source: https://arxiv.org/abs/2502.16982
    """
    return _svd_entropy(_singular_values(W))


def effective_rank(W: Tensor) -> Tensor:
    """Count the singular values that matter, from 1 to min(rows, cols):

        exp(-Σ pᵢ log pᵢ)    with    pᵢ = σᵢ / Σ σⱼ

    This is the definition of those who named it, with p by σ; `svd_entropy` has p by σ², so neither follows from the
    other.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a zero matrix and for one without elements; NaN for one with NaN or infinity.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    return _effective_rank(_singular_values(W))


def stable_rank(W: Tensor) -> Tensor:
    """Compute ‖W‖_F² / ‖W‖₂², from 1 to min(rows, cols), which hardly depends on small singular values.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a zero matrix and for one without elements; NaN for one with NaN or infinity.

    Source: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007.
    """
    return _stable_rank(_singular_values(W))


def condition(W: Tensor) -> Tensor:
    """Divide the largest singular value by the smallest, from 1 to infinity.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. Infinity where the smallest is 0, as in a zero matrix and in one without elements; some number
        above 1e15 where it is 0 but for rounding. NaN for a matrix with NaN or infinity.
    """
    return _condition(_singular_values(W))


def rms(W: Tensor) -> Tensor:
    """Compute the root of the mean square of the elements.

    "match_rms_adamw" aims at 0.2 lr for that of an update. With the coefficients of "keller", the default, it comes to
    0.17 to 0.18 lr for gradients of independent normal numbers; `exact_rms=True` makes it 0.2 lr.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a matrix without elements; NaN and infinity stay what they are.
    """
    _check(W)
    norm: Tensor = torch.linalg.vector_norm(W.detach().double(), dim=(-2, -1))
    return norm / math.sqrt(max(W.shape[-2] * W.shape[-1], 1))


def summary(W: Tensor) -> Summary:
    """Compute all five quantities from one decomposition.

    Args:
        W: (..., rows, cols), see `svd_entropy`.
    """
    sigma = _singular_values(W)
    return Summary(_svd_entropy(sigma), _effective_rank(sigma), _stable_rank(sigma), _condition(sigma), rms(W))


def _check(W: Tensor) -> None:
    if not isinstance(W, Tensor) or not W.is_floating_point():
        raise TypeError(
            f"W should be a tensor of a floating dtype but is: {W.dtype if isinstance(W, Tensor) else type(W).__name__}"
        )
    if W.ndim < 2:
        raise ValueError(f"W should be matrices (..., rows, cols) but has size: {tuple(W.shape)}")


def _singular_values(W: Tensor) -> Tensor:
    """Compute the singular values, (..., n), descending, in float64.

    A matrix with NaN or infinity has NaN, and an empty one a single zero.
    """
    _check(W)
    W = W.detach().double()
    if W.shape[-2] < W.shape[-1]:
        W = W.mT  # LAPACK takes half the time for tall ones
    if W.shape[-1] == 0:
        return W.new_zeros(*W.shape[:-2], 1)
    finite = W.isfinite().flatten(-2).all(-1, keepdim=True)
    # LAPACK raises for the whole batch where one matrix is not finite.
    sigma: Tensor = torch.linalg.svdvals(W.where(finite.unsqueeze(-1), 0.0))
    return sigma.where(finite, math.nan)


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, with 0 / 0 = 0."""
    return part / whole.where(whole != 0, 1.0)


def _relative(sigma: Tensor) -> Tensor:
    """Divide by the largest, so that no square leaves the range. The first becomes 1, or 0 for a zero matrix."""
    return _over(sigma, sigma[..., :1])


def _entropy(weights: Tensor) -> Tensor:
    """Compute -Σ p log p of p = weights / Σ weights."""
    entropy: Tensor = torch.special.entr(_over(weights, weights.sum(-1, keepdim=True))).sum(-1)
    return entropy


def _svd_entropy(sigma: Tensor) -> Tensor:
    s = _relative(sigma)
    if s.shape[-1] == 1:
        return s[..., 0]
    return (_entropy(s.square()) / math.log(s.shape[-1])).clamp(max=1.0)


def _effective_rank(sigma: Tensor) -> Tensor:
    s = _relative(sigma)
    return s[..., 0] * _entropy(s).exp()


def _stable_rank(sigma: Tensor) -> Tensor:
    return _relative(sigma).square().sum(-1)


def _condition(sigma: Tensor) -> Tensor:
    smallest = sigma[..., -1]
    return (sigma[..., 0] / smallest).where(smallest != 0, math.inf)
