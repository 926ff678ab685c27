"""`orthogonalize(backend=gpu.backend)` against the float64 spectral truth, as tests/test_newton_schulz.py does it."""

from __future__ import annotations

import pytest
import torch

from checks.step import Gpu
from muon_kernels import COEFFICIENTS, orthogonalize
from muon_kernels.checks.matrices import SPECTRA, factors, spectral_truth
from muon_kernels.checks.steps import misses
from muon_kernels.checks.yardsticks import bf16_loop, relative_error
from muon_kernels.coefficients import resolve


@pytest.mark.parametrize("shape", [(136, 160), (256, 64), (129, 300)], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_accuracy(gpu: Gpu, name: str, shape: tuple[int, int]) -> None:
    assert not misses(name, shape, (1,), gpu.device, backend=gpu.backend)


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != "zero"])
@pytest.mark.parametrize("shape", [(256, 1024), (64, 100)], ids=str)
@pytest.mark.parametrize("name", ["keller", "polar_express"])
def test_fp16_is_four_times_more_accurate(gpu: Gpu, name: str, shape: tuple[int, int], spectrum: str) -> None:
    schedule = resolve(name)
    U, s, V = factors(spectrum, *shape)
    G = ((U * s) @ V.mT).float()
    truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
    ours = orthogonalize(G.to(gpu.device), name, None, backend=gpu.backend, workspace_dtype=torch.float16).cpu()
    assert 4 * relative_error(ours, truth) <= relative_error(bf16_loop(G[None], schedule)[0], truth)
