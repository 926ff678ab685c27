"""The rows that bench/ has for CUDA do what they say; how fast, only a GPU can tell."""

from __future__ import annotations

import bench_step
import measure
import pytest
import torch
from ptx.standin import Runtime
from test_bench import assert_same_products
from test_end_to_end import needs_nvcc

pytestmark = needs_nvcc


@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 70, 70)], ids=str)
def test_products(emulated: Runtime, shape: tuple[int, int, int]) -> None:
    assert_same_products("cuda", shape, "cpu")
    assert len(emulated.log) == 3


def test_step(emulated: Runtime) -> None:
    (p,) = measure.copied(measure.parameters([(24, 40, 1)]), "cpu")
    before = p.detach().clone()
    bench_step.implementations("cpu")["cuda"]([p])()
    assert len(emulated.log) == 1 and not torch.equal(p, before)
