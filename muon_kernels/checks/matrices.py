"""Matrices with known singular values, and what Newton-Schulz must make of them.

Newton-Schulz commutes with orthogonal factors: it maps U diag(s) Vᵀ to U diag(p(s)) Vᵀ. So the
spectrum is what a test has to vary, not the seed, and the truth needs no iteration on matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Triples = Sequence[tuple[float, float, float]]


def _ranks(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def _gaussian(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    values: Tensor = torch.linalg.svdvals(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return values


# Name -> the n singular values, in float64 and not normalised.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "gaussian": _gaussian,
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "power -1/2": lambda n: _ranks(n) ** -0.5,
    "power -1": lambda n: _ranks(n) ** -1,
    "power -2": lambda n: _ranks(n) ** -2,
    "exponential": lambda n: torch.logspace(0, -6, n, dtype=torch.float64),
    "one large": lambda n: 1e-3 ** (_ranks(n) > 1).double(),
    "rank 8": lambda n: (_ranks(n) <= 8).double(),
    "zero": lambda n: torch.zeros(n, dtype=torch.float64),
}


@lru_cache(maxsize=512)
def factors(spectrum: str, m: int, n: int, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (*batch, m, k), s (k,) and V (*batch, n, k) in float64, k = min(m, n); U, V random."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)

    def orthonormal(rows: int) -> Tensor:
        gaussian = torch.randn(*batch, rows, k, generator=generator, dtype=torch.float64)
        Q: Tensor = torch.linalg.qr(gaussian).Q
        return Q

    return orthonormal(m), SPECTRA[spectrum](k), orthonormal(n)


def make(
    spectrum: str,
    m: int,
    n: int,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """Return U diag(s) Vᵀ of shape (*batch, m, n), built in float64 and rounded once to dtype."""
    U, s, V = factors(spectrum, m, n, batch, seed)
    return ((U * s) @ V.mT).to(dtype)


def polynomial(sigma: Tensor, triples: Triples) -> Tensor:
    """Apply every p(x) = a x + b x³ + c x⁵ in turn, elementwise and in the dtype of sigma."""
    for a, b, c in triples:
        sigma = sigma * (a + b * sigma**2 + c * sigma**4)
    return sigma


def spectral_truth(U: Tensor, s: Tensor, V: Tensor, triples: Triples, margin: float) -> Tensor:
    """Return U diag(p(s / (margin ‖s‖))) Vᵀ, and zero for s = 0."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    sigma = s / (margin * norm.where(norm != 0, 1.0))
    return (U * polynomial(sigma, triples).unsqueeze(-2)) @ V.mT
