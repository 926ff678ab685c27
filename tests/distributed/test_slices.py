"""Slices of fp16 directions, as a GPU's kernels write them, put together on their owner."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from muon_kernels.distributed.slices import Rectangle, gather_slices, scale_of, shift_of, to_half_norms

MARGIN, EPS = 1.02, 1e-7


def written(part: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
    """x times 2^power in fp16, its norm, and the scale that brings x to norm 1/margin."""
    norm = torch.linalg.vector_norm(part, dim=(1, 2))
    scale = (1 / (norm * 2.0**power * MARGIN)).where(norm != 0, 0.0).where(norm.isfinite(), torch.nan)
    return (part * 2.0**power).half(), norm, scale.float()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_fp16_slices_of_any_norm(size: float) -> None:
    """Whatever power of two each slice came with, the matrix is the direction, within the rounding of fp16."""
    G = torch.randn(3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
    G[0, :8] = 0
    G[1, 8:] *= 2.0**-9
    parts = [(Rectangle(top, 0, 8, 40), G[:, top : top + 8]) for top in (0, 8, 16)]
    received = []
    for n, (where, part) in enumerate(parts):
        power = -math.floor(math.log2(size)) + (0, 3, 6)[n]  # elements are normal numbers of fp16
        x, norm, scale = written(part, power)
        to_half_norms(x, norm, scale, MARGIN)
        sizes = torch.linalg.vector_norm(x.double(), dim=(1, 2))
        assert all(s == 0 or 2**5.99 <= s < 2**7.01 for s in sizes)
        received.append((where, x, norm))
    X = torch.empty(3, 24, 40, dtype=torch.float16)
    norms, shift = gather_slices(received, X, scaled=False)
    found = X.double() * scale_of(norms, shift, EPS, MARGIN).double()[:, None, None]
    expected = G / torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True) / MARGIN
    # The slices are rounded once; rows of another power again only where they leave fp16's normal range.
    torch.testing.assert_close(found, expected, rtol=2.0**-11 + 2.0**-22, atol=2.0**-24 / 2**6)


def test_fp16_slices_that_are_not_sound() -> None:
    """Zeros stay zeros, and NaN and infinity give NaN."""
    G = torch.ones(3, 4, 6, dtype=torch.float64)
    G[0], G[1, 2, 3], G[2, 0, 0] = 0, torch.nan, torch.inf
    x, norm, scale = written(G, 0)
    to_half_norms(x, norm, scale, MARGIN)
    X = torch.empty(3, 4, 6, dtype=torch.float16)
    norms, shift = gather_slices([(Rectangle(0, 0, 4, 6), x, norm)], X, scaled=False)
    found = scale_of(norms, shift, EPS, MARGIN)
    assert not X[0].any() and found[0] == 0 and found[1:].isnan().all()
    assert shift_of(norm, torch.float16).tolist() == [0, 0, 0]
