"""What the ledger counts as traffic is what the kernels ask memory for, by the executor's profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from products import KERNELS, kernel_of
from ptx.standin import Runtime
from test_end_to_end import needs_nvcc
from torch import nn

from muon_kernels import Muon
from muon_kernels.backends import cuda
from muon_kernels.cli.ledger import Requests, requested, traffic
from muon_kernels.coefficients import resolve
from muon_kernels.newton_schulz import Square
from muon_kernels.step.plan import plan_for_shapes

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def profiled(emulated: Runtime) -> Iterator[Runtime]:
    """See `emulated`. On 108 multiprocessors, what is small enough to be executed gets the smallest tile."""
    multiprocessors = emulated.device.multiprocessors
    emulated.device.multiprocessors = 108
    with emulated.options(profile=True, any_memory=True):
        yield emulated
    emulated.device.multiprocessors = multiprocessors


def asked(runtime: Runtime, kernels: str = "") -> int:
    """Bytes of all sectors that the kernels with this in their names asked for."""
    return 32 * sum(p.total("sectors") for name, p in runtime.profiles.items() if kernels in name)


def step(runtime: Runtime, shape: tuple[int, ...], dtype: torch.dtype, momentum_dtype: torch.dtype) -> Muon:
    p = nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn_like(p)
    muon = Muon([p], lr=0.1, backend="cuda", momentum_dtype=momentum_dtype)
    muon.step()
    assert not runtime.failures
    return muon


@needs_nvcc
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((16, 256), (F32, F32)), ((64, 64), (BF16, BF16)), ((2, 96, 160), (F32, F32)), ((128, 256), (BF16, F32))],
    ids=str,
)
def test_a_fused_step(profiled: Runtime, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """To the byte and the FLOP; gradient and momentum are read once more than would be needed."""
    plan = step(profiled, shape, *dtypes).plan()
    assert [b.fused for b in plan.buckets] == [True]
    assert asked(profiled) == plan.bytes and requested(plan, 64, resolve("keller")) == 0
    tensor = [row for profile in profiled.profiles.values() for row in profile.rows if row.tensor]
    assert sum(row.threads for row in tensor) // 32 * 16 * 8 * 16 * 2 == plan.flops
    again = torch.Size(shape).numel() * (dtypes[0].itemsize + dtypes[1].itemsize)
    assert plan.bytes == plan.least_bytes + again


@needs_nvcc
def test_a_fused_step_in_parts(profiled: Runtime) -> None:
    """To the FLOP; the exponents of parts, which are read twice, are a sector of 33 in the plan."""
    plan = step(profiled, (16, 2048), F32, F32).plan()
    assert [b.parts for b in plan.buckets] == [32]
    assert 1 <= asked(profiled) / plan.bytes < 1.03
    tensor = [row for profile in profiled.profiles.values() for row in profile.rows if row.tensor]
    assert sum(row.threads for row in tensor) // 32 * 16 * 8 * 16 * 2 == plan.flops


@needs_nvcc
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
def test_a_step_in_products(profiled: Runtime, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Only partial norms (here below 0.1 %) and diagonals (below 3 %) are not in the formulas."""
    plan = step(profiled, (192, 256), *dtypes).plan()
    assert [b.fused for b in plan.buckets] == [False]
    products = asked(profiled, "product")
    assert 1 <= (asked(profiled) - products) / plan.bytes < 1.001
    assert plan.bytes == plan.least_bytes
    assert 1 <= products / requested(plan, cuda.product_tiles()[0], resolve("keller")) < 1.03


@needs_nvcc
@pytest.mark.parametrize("tile", cuda.product_tiles())
@pytest.mark.parametrize(
    ("shape", "precise", "most"), [((128, 256), False, 1.03), ((128, 256), True, 1.07), ((104, 200), True, 1.12)]
)
def test_products(profiled: Runtime, shape: tuple[int, int], precise: bool, most: float, tile: int) -> None:
    """More than the formula: halves of sectors, along the diagonal and at the ends of rows; and diagonals, which it
    leaves out. That is much only of matrices as small as these."""
    m, n = shape
    profiled.device.multiprocessors = 108 if tile == 64 else 1
    X, Y = (torch.randn(2, m, n).bfloat16() for _ in range(2))
    A, B, out = (Square(torch.randn(2, m, m).bfloat16(), torch.randn(2, m) if precise else None) for _ in range(3))
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("syrk", (X,), {"out": out}),
        ("syrk", (A,), {"C": A, "alpha": 0.5, "beta": 0.5, "out": out}),
        ("syrkx", (A, B), {"out": out}),
        ("gemm", (A, X), {"out": Y}),
        ("gemm", (A, X), {"C": X, "beta": 0.5, "out": Y}),
    ]
    for verb, operands, options in calls:
        with profiled.options(profile=True, any_memory=True):
            getattr(cuda, verb)(*operands, **options)
            (launched,) = profiled.log
            asked_for = asked(profiled)
        assert kernel_of(launched.kernel)[:2] == (tile, tile)
        counter = Requests(cuda.symmetric_products, cuda.precise_squares, tile)
        getattr(counter, verb)(*operands, **options)
        ratio = asked_for / counter.bytes
        assert (1 if (m, n) == (128, 256) else 0.6) <= ratio < most, verb


def test_the_tiles_are_those_of_the_kernels() -> None:
    sides = [side for kernel in KERNELS for side in kernel[:2]]
    assert cuda.product_tiles() == (min(sides), max(sides))


def test_in_words() -> None:
    def words(*shapes: tuple[int, int, int]) -> str:
        return traffic(
            plan_for_shapes(shapes, device="cuda", backend="cuda", available=False), "cuda", resolve("keller")
        )

    assert "1.40 of the least" in words((64, 768, 108)) and "products" not in words((64, 768, 108))
    assert "2.60 of the least" in words((64, 768, 9))  # in parts, which leave squares for one another
    assert "1.00 of the least" in words((768, 768, 9)) and "they load 1623 to 2895 MB" in words((768, 768, 9))
