"""What a rank does to its own shards: fp16 slices as a GPU's kernels write them, sums of columns, packed masters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from muon_kernels.distributed import lots
from muon_kernels.distributed.lots import Entry, Kept, in_memory, numbers_for, params_of
from muon_kernels.distributed.shards import layouts
from muon_kernels.distributed.slices import Rectangle, gather_slices, scale_of, shift_of, to_half_norms
from muon_kernels.layout import Layout
from muon_kernels.split import pieces
from muon_kernels.stages.sums import sums_of_squares

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


@pytest.mark.parametrize("size", [2.0**-40, 2.0**-10, 2.0**31])
def test_bf16_slices_of_any_norm(size: float) -> None:
    """Slices come times a power of two where their own norm is far from 1; the matrix has one power, its norm's."""
    G = torch.randn(4, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    G[0, 4:] *= size  # one slice
    G[1] *= size
    G[2, :4] = 0
    G[3, 0, 0] = torch.nan
    received, kept = [], []
    for top in (0, 4):
        part = G[:, top : top + 4]
        norm = torch.linalg.vector_norm(part, dim=(1, 2))
        power = shift_of(norm, torch.bfloat16)
        received.append((Rectangle(top, 0, 4, 12), (part * torch.exp2(power)[:, None, None]).bfloat16(), norm))
        kept.append(int((power != 0).sum()))
    assert any(kept) == (size != 2.0**-10)
    for some in ([0, 1, 2, 3], [1]):
        X = torch.empty(len(some), 8, 12, dtype=torch.bfloat16)
        norms, shift = gather_slices([(at, x[some], norm[some]) for at, x, norm in received], X, scaled=False)
        whole = torch.linalg.vector_norm(G[some], dim=(1, 2))
        torch.testing.assert_close(norms, whole, rtol=1e-15, atol=0, equal_nan=True)
        assert shift.tolist() == shift_of(whole, torch.bfloat16).tolist()
        found = X.double() * torch.exp2(-shift.double())[:, None, None]
        torch.testing.assert_close(found, G[some], rtol=0, atol=0, equal_nan=True)


def test_a_column_has_one_sum() -> None:
    """Whatever stands beside it: ranks that hold some columns of a stack have the bits of one process."""
    X = torch.randn(2, 37, 203, generator=torch.Generator().manual_seed(0)).bfloat16()
    of = lambda x: sums_of(x, -2)
    whole = of(X)
    for cut in (1, 66, 101, 202):
        assert torch.equal(torch.cat([of(X[..., :cut]), of(X[..., cut:])], -1), whole)
    torch.testing.assert_close(whole.double(), X.double().square().sum(-2, keepdim=True), rtol=1e-6, atol=0)


def sums_of(x: Tensor, dim: int) -> Tensor:
    out, partial = torch.empty(2, *x.sum(dim, keepdim=True).shape)
    sums_of_squares(x, dim, out, partial, torch.empty(1000))
    return out


@pytest.mark.parametrize("tall", [False, True])
def test_masters_in_pieces(tall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is unpacked once, in the orientation that verbs see, and packed again; a few at a time."""
    monkeypatch.setattr(lots, "_NUMBERS_ON_CPU", 250)
    shape = (5, 12, 8) if tall else (5, 8, 12)
    at = Layout(1, 8, 12, 0, 0, *((1, 8) if tall else (12, 1)), tall)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    upper, lower = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.int16)
    entries = [Entry(i, at, None, None, 1.0, tall, None, at, None) for i in range(5)]
    packed = params_of(Kept(list(upper), None, list(lower)), entries)
    for step in (0, 1):
        calls = 0
        for some, seen in in_memory(packed, torch.empty(numbers_for(packed))):
            calls += 1
            for i, matrices in zip(range(5)[some], seen, strict=True):
                wide = numbers[i].mT if tall else numbers[i]
                if step:
                    assert torch.equal(matrices.view()[0], wide)
                matrices.view()[0].copy_(wide)
        assert calls == 3  # of two, of 96 numbers each
    assert torch.equal(upper, numbers.bfloat16())


def test_parts_that_no_strides_describe() -> None:
    """The error names the split where it, and not the parameter, is in the way."""
    queries = next(iter(pieces((24, 4), None, "qkv(4, 2, interleaved=True)")))
    with pytest.raises(ValueError, match="contiguous, and divided by a split to parts that strides describe, but one"):
        layouts(torch.empty(24, 4), None, queries, 1, False)
    channels_last = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"should be contiguous but one of size \(4, 3, 2, 2\) has strides"):
        layouts(channels_last, True, None, 1, False)
