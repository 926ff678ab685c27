"""Powers of the spectrum as the authors of arXiv 2602.04669 compute them, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def papers_power(G: Tensor, p: float) -> Tensor:
    """Return the power of G by arXiv 2602.04669, batched.

    15 coupled fp32 steps give (G Gᵀ)^-½ and 15 more its root; p = 1/4 takes twice that.

    Args:
        G: (..., m, n), fp32.
        p: 0.5 or 0.25.

    Source: github.com/Ocram7/BeyondMuon, spectral_ns.py, ridges included.
    """
    if p == 0.25:
        return papers_power(papers_power(G, 0.5), 0.5)

    def coupled(A: Tensor) -> tuple[Tensor, Tensor]:
        n = A.shape[-1]
        eye = torch.eye(n, device=A.device).expand_as(A)
        A = A + (1e-6 + 1e-4 * A.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / n) * eye
        s = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
        Y, Z = A / s, eye
        for step in range(15):
            T = 0.5 * (3 * eye - Z @ Y)
            Y, Z = Y @ T, T @ Z
            if step in (5, 10, 14):
                Y, Z = (Y + Y.mT) / 2, (Z + Z.mT) / 2
        return s.sqrt() * Y, Z / s.sqrt()

    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    H, _ = coupled(coupled(X @ X.mT)[1])
    result = H @ X
    return result.mT if tall else result
