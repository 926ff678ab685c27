"""`orthogonalize(backend="cuda")` on compute capability 9.0 against the float64 spectral truth."""

from __future__ import annotations

import pytest
import torch
from checks import accuracy
from checks.step import Gpu
from emulated import on
from ptx import standin
from test_newton_schulz import misses

from muon_kernels import COEFFICIENTS, orthogonalize


@pytest.fixture
def gpu(emulated_sm90: standin.Runtime) -> Gpu:
    """The stand-in runtime; on a GPU test_accuracy_cuda.py takes the kernels that it has."""
    return on(emulated_sm90)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_accuracy(gpu: Gpu, name: str) -> None:
    assert not misses(name, (136, 160), (1,), gpu.device, backend=gpu.backend)


def test_fp16_is_four_times_more_accurate(gpu: Gpu) -> None:
    accuracy.test_fp16_is_four_times_more_accurate(gpu, "polar_express", (256, 320), "power -1")


def test_products_are_those_of_sm90(gpu: Gpu, emulated_sm90: standin.Runtime) -> None:
    orthogonalize(torch.randn(136, 160), backend=gpu.backend)
    products = [launch.kernel for launch in emulated_sm90.log if "product" in launch.kernel]
    assert len(products) > 10 and all("product_sm90" in name for name in products)
