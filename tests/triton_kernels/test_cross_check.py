"""Two implementations, written apart, of the same verbs: Triton's and CUDA C++'s on the same inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.step import stepped
from ptx import standin
from torch import Tensor

from muon_kernels.checks.matrices import SPECTRA, factors, spectral_truth
from muon_kernels.checks.yardsticks import bf16_loop, relative_error

sys.path.append(str(Path(__file__).parents[1] / "cuda"))

from emulated import running
from emulated_gpu import emulated

from muon_kernels import orthogonalize
from muon_kernels.coefficients import resolve

pytestmark = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")


@pytest.fixture(params=[80, 90], ids=str)
def both(request: pytest.FixtureRequest, on_the_cpu: Any) -> Any:
    """Calls a function with the name of each backend."""
    on_the_cpu.capabilities = divmod(request.param, 10)

    def call(function: Any) -> tuple[Any, Any]:
        with running() as runtime:
            by_cuda = function("cuda")
            assert runtime.log and not runtime.failures
        with emulated(request.param, 108, None) as device:
            by_triton = function("triton")
            assert device.log and not device.warnings()
        return by_cuda, by_triton

    return call


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["keller", "polar_express", "deepseek_v4"])
@pytest.mark.parametrize("shape", [(48, 48), (72, 200), (200, 72), (136, 160)], ids=str)
def test_orthogonalize(both: Any, shape: tuple[int, int], name: str, spectrum: str) -> None:
    """As near to each other as each has to be to the truth."""
    schedule = resolve(name)
    U, s, V = factors(spectrum, *shape, batch=(2,))
    G = ((U * s) @ V.mT).float()
    by_cuda, by_triton = both(lambda backend: orthogonalize(G, name, None, backend=backend))
    if spectrum == "zero":
        assert torch.equal(by_cuda, by_triton)
        return
    truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
    torchs = relative_error(bf16_loop(G, schedule), truth)
    assert relative_error(by_triton, by_cuda.double()) <= max(1.3 * torchs, 0.025)


@pytest.mark.parametrize("name", ["keller", "you6"])
def test_steps(both: Any, name: str) -> None:
    """Momentum to the bit. Updates of steps in one launch, whose iteration is exact to 16 bits or more, nearly so."""

    def step(backend: str) -> tuple[list[Tensor], list[Tensor]]:
        return stepped(backend, ns_coefficients=name)[:2]

    (params, momenta), (theirs, their_momenta) = both(step)
    assert all(map(torch.equal, momenta, their_momenta))
    for p, q in zip(params, theirs, strict=True):
        updates = 0.1 * (p.numel() / max(p.shape[-2:])) ** 0.5  # the norm of one, at least
        fused = min(p.shape[-2:]) <= 64
        assert float((p - q).norm()) <= (1e-3 if fused else 2.5e-2) * 2 * updates
