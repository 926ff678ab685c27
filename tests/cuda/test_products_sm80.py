"""The products of csrc/cuda, compiled by nvcc and executed on the CPU: launches, kernels and all, against float64."""

from __future__ import annotations

from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import products as p
import pytest
import torch
from checks import products as checks
from checks.products import UNIT_ROUNDOFF, empty, exact, integers, placed, symmetric, untouched
from products import Kernel, Products, chosen
from ptx import LaunchError, standin
from torch import Tensor

pytestmark = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")

SIZES = [1, 3, 17, 63, 65, 129]
WIDTHS = [16, 8, 4, 2]
dtypes = pytest.mark.parametrize("dtype", p.DTYPES.values(), ids=p.DTYPES)
kernels = pytest.mark.parametrize(
    "kernel", p.KERNELS, ids=lambda k: f"{k.block_m}x{k.block_n}-{'nt'[k.transposed]}-{k.aligned}"
)


@pytest.fixture(scope="module")
def cuda(built: tuple[ModuleType, standin.Runtime]) -> Products:
    return Products(*built)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def operands(kernel: Kernel, batch: int, dtype: torch.dtype, make: Any = integers) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and an output that this kernel is chosen for."""
    m, n, k = p.KERNELS[kernel]
    width = 16 if kernel.aligned else 2
    a = placed(make(batch, m, k, dtype=dtype), width)
    b = a if kernel.transposed else placed(make(batch, k, n, dtype=dtype), width)
    return a, b, empty(batch, m, n, dtype, width)


@dtypes
@kernels
def test_every_kernel_is_exact_on_integers(cuda: Products, kernel: Kernel, dtype: torch.dtype) -> None:
    a, b, out = operands(kernel, 2, dtype)
    c = placed(integers(*out.shape, dtype=dtype), 16 if kernel.aligned else 2)
    scale = torch.tensor([0.5, 2.0])
    cuda(a, b, out, b_transposed=kernel.transposed, c=c, alpha=2.0, beta=-4.0, gamma=8.0, scale=scale)
    assert cuda.kernel == kernel
    scales = (scale**2 if kernel.transposed else scale)[:, None, None]
    sums = 2 * exact(a, b, kernel.transposed) - 4 * c.double() + 8 * torch.eye(*out.shape[1:])
    assert torch.equal(out, (scales * sums).to(dtype))
    assert untouched(out)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("m", SIZES)
def test_any_size_and_stride(cuda: Products, m: int, batch: int, width: int) -> None:
    """On one multiprocessor and on many, so that large and small tiles have their turn."""
    if m == 129 and batch == 7:
        batch = 2
    for n, multiprocessors in ((m + 5, 1), (2 * m + 1, 108)):
        checks.any_shape(partial(cuda, multiprocessors=multiprocessors), batch, m, n, width)
        assert not batch or (cuda.kernel and cuda.kernel.aligned == (width == 16))


@pytest.mark.parametrize("which", ["a", "b", "c", "out"])
@pytest.mark.parametrize("width", [8, 4, 2])
def test_one_operand_may_be_less_aligned_than_the_others(cuda: Products, which: str, width: int) -> None:
    checks.one_less_aligned(cuda, which, width)
    assert cuda.kernel == Kernel(64, 64, False, False)


def test_distance_of_matrices_alone_may_be_odd(cuda: Products) -> None:
    checks.odd_distance_of_matrices(cuda)


@dtypes
@pytest.mark.parametrize(("m", "width"), [(1, 2), (17, 4), (63, 16), (65, 16), (129, 16), (136, 2), (184, 16)])
def test_parts_of_squares_are_exact_on_integers(cuda: Products, m: int, width: int, dtype: torch.dtype) -> None:
    checks.parts_of_squares(cuda, m, width, dtype)


@dtypes
@kernels
def test_error_is_that_of_one_rounding(cuda: Products, kernel: Kernel, dtype: torch.dtype) -> None:
    """|out - exact| ≤ u |exact| + (k + 4) 2^-24 (Σ|a||b| + |c|): one rounding of a sum in fp32."""
    make = lambda *shape, dtype: torch.randn(shape).to(dtype)
    a, b, out = operands(kernel, 1, dtype, make)
    c = make(*out.shape, dtype=dtype)
    cuda(a, b, out, b_transposed=kernel.transposed, c=placed(c, 16 if kernel.aligned else 2), alpha=0.3, beta=1.7)
    assert cuda.kernel == kernel
    alpha, beta = torch.tensor([0.3, 1.7]).double()
    right = alpha * exact(a, b, kernel.transposed) + beta * c.double()
    size = alpha * exact(a.abs(), b.abs(), kernel.transposed) + beta * c.double().abs()
    bound = UNIT_ROUNDOFF[dtype] * right.abs() + (a.shape[2] + 4) * 2**-24 * size + 2**-25  # f16 has subnormals
    assert ((out.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("m", [17, 72])
def test_precise_squares(cuda: Products, m: int) -> None:
    checks.precise_squares(cuda, m)


@pytest.mark.parametrize("transposed", [False, True])
def test_bits_depend_on_nothing_but_the_matrix(cuda: Products, transposed: bool) -> None:
    """Runs, batches, tiles, alignments and orders: the same bits; and symmetric to the last one."""
    X = torch.randn(3, 200, 200).bfloat16()
    results, ran = [], set()
    for width, multiprocessors, order in (
        (16, 1, "forward"),
        (16, 1, "random"),
        (16, 108, "forward"),
        (2, 1, "forward"),
    ):
        at, out = placed(X, width), empty(3, 200, 200, width=width)
        cuda(at, at, out, b_transposed=transposed, symmetric=transposed, multiprocessors=multiprocessors, order=order)
        results.append(out.clone())
        ran.add(cuda.kernel)
    alone = [empty(1, 200, 200) for _ in range(3)]
    for i, out in enumerate(alone):
        at = placed(X[i : i + 1])
        cuda(at, at, out, b_transposed=transposed, symmetric=transposed)
    results.append(torch.cat(alone))
    assert len(ran) == 3
    assert all(torch.equal(r, results[0]) for r in results)
    if transposed:
        assert torch.equal(results[0], results[0].mT)


def test_a_result_is_symmetric_even_if_the_product_is_not(cuda: Products) -> None:
    for multiprocessors in (1, 108):
        checks.result_is_symmetric(partial(cuda, multiprocessors=multiprocessors))


def test_many_tiles_of_a_triangle(cuda: Products) -> None:
    """Every tile is at its place, and only those of a triangle are launched."""
    X, out = placed(integers(1, 1300, 8)), empty(1, 1300, 1300)
    cuda(X, X, out, b_transposed=True, symmetric=True, multiprocessors=10**6)
    assert cuda.log[-1].grid == (21 * 22 // 2, 1, 1)
    assert torch.equal(out, exact(X, X, True).bfloat16()) and untouched(out)


@kernels
def test_order_and_time_do_not_matter(cuda: Products, kernel: Kernel) -> None:
    """Threads and blocks in any order, asynchronous copies that land at once, at the last moment, or in between."""
    a, b, out = operands(kernel, 2, torch.bfloat16)
    width = 16 if kernel.aligned else 4
    c = placed(symmetric(2, out.shape[1]) if kernel.transposed else integers(*out.shape), width)
    right = (exact(a, b, kernel.transposed) + c.double()).bfloat16()
    for order, asynchrony in product(("forward", "backward", "random"), ("early", "late", "random")):
        out.fill_(torch.nan)
        keywords = dict(b_transposed=kernel.transposed, symmetric=kernel.transposed, c=c, beta=1.0)
        cuda(a, b, out, order=order, asynchrony=asynchrony, seed=3, **keywords)
        assert cuda.kernel == kernel
        assert torch.equal(out, right), (order, asynchrony)


@kernels
def test_no_races(cuda: Products, kernel: Kernel) -> None:
    """With an addend and without one: the last stage is another, and lies under the result or not."""
    a, b, out = operands(kernel, 1, torch.bfloat16)
    added = placed(
        symmetric(1, out.shape[1]) if kernel.transposed else integers(*out.shape), 16 if kernel.aligned else 2
    )
    for c in (added, None):
        keywords = dict(b_transposed=kernel.transposed, symmetric=kernel.transposed, c=c, beta=1.0)
        cuda(a, b, out, order="random", races=True, **keywords)
        assert cuda.kernel == kernel
        assert not any(launch.warnings for launch in cuda.log)


# Shapes of whole tiles, and at most so many other instructions of PTX for each mma, epilogue and addend included: the
# main loop has 2 to 4, the more the smaller the tile.
PROFILED = {
    Kernel(128, 128, True, True): ((256, 256, 1024), 4.0),
    Kernel(128, 128, False, True): ((128, 128, 1024), 4.0),
    Kernel(128, 64, False, True): ((128, 64, 1024), 5.5),
    Kernel(64, 64, True, True): ((192, 192, 1024), 6.0),
    Kernel(64, 64, False, True): ((192, 192, 1024), 6.0),
}


@pytest.mark.parametrize("kernel", PROFILED, ids=lambda k: f"{k.block_m}x{k.block_n}-{'nt'[k.transposed]}")
def test_profile(cuda: Products, kernel: Kernel) -> None:
    """Counts that decide speed: no bank conflicts, whole sectors, few instructions beside those of the tensor cores."""
    (m, n, k), others = PROFILED[kernel]
    a = torch.randn(1, m, k).bfloat16()
    b = a if kernel.transposed else torch.randn(1, k, n).bfloat16()
    c, out = torch.randn(1, m, n).bfloat16(), torch.empty(1, m, n).bfloat16()
    keywords = dict(b_transposed=kernel.transposed, symmetric=kernel.transposed, c=c, beta=1.0)
    cuda(a, b, out, profile=True, multiprocessors=1 if kernel.block_m == 128 else 108, **keywords)
    profile = cuda.profiles[kernel]
    tiles_m, tiles_n = m // kernel.block_m, n // kernel.block_n
    tiles = tiles_m * (tiles_m + 1) // 2 if kernel.transposed else tiles_m * tiles_n
    block = kernel.block_m * kernel.block_n
    assert profile.tensor_instructions == tiles * block * k / 2048
    assert profile.bank_conflicts == 0, profile.table()
    assert profile.sector_efficiency >= 0.95, profile.table()
    assert profile.other_per_tensor <= others
    # Operands once a tile, the addend once a tile, the result once.
    operand_bytes = tiles * (kernel.block_m + kernel.block_n) * k * 2
    assert profile.global_bytes == operand_bytes + tiles * block * 2 + m * n * 2
    # Operands by 16-byte copies, results by 16-byte stores.
    stores = [r for r in profile.rows if r.op.startswith("st.global")]
    assert stores and all(r.op.startswith("st.global.v4") for r in stores)


@pytest.mark.parametrize("m", [1, 17, 65])
def test_without_columns_only_the_addends_are_left(cuda: Products, m: int) -> None:
    checks.without_columns(cuda, m)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do_is_nothing_launched(cuda: Products, shape: tuple[int, int, int]) -> None:
    batch, m, n = shape
    cuda(torch.empty(batch, m, 4).bfloat16(), torch.empty(batch, 4, n).bfloat16(), torch.empty(batch, m, n).bfloat16())
    assert not cuda.log


def test_products_run_in_order(cuda: Products) -> None:
    X, A, B = placed(integers(2, 20, 33)), empty(2, 20, 20), empty(2, 20, 33)
    first = cuda.product(X, X, A, b_transposed=True, symmetric=True, alpha=0.125)
    second = cuda.product(A, X, B)
    cuda.run(first, second)
    assert len(cuda.log) == 2
    assert torch.equal(B, (A.double() @ X.double()).float().bfloat16())


def test_nan_stays_in_its_matrix(cuda: Products) -> None:
    checks.nan_stays_in_its_matrix(cuda)


def test_offsets_have_64_bits(cuda: Products) -> None:
    checks.offsets_have_64_bits(cuda)


def test_many_matrices_take_one_launch(cuda: Products) -> None:
    checks.many_matrices(partial(cuda, multiprocessors=108))
    assert [launch.grid for launch in cuda.log] == [(checks.MANY, 1, 1)]


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_choice_of_tiles(cuda: Products, multiprocessors: int) -> None:
    """Large tiles as soon as they fill the GPU, small ones before."""
    pick = lambda *shape: chosen(cuda, *shape, multiprocessors, shape[0] == shape[1])
    assert pick(4096, 4096, 4096, 1) == (Kernel(128, 128, True, True), 32 * 33 // 2)
    assert pick(4096, 11008, 4096, 1) == (Kernel(128, 128, False, True), 32 * 86)
    assert pick(256, 256, 1024, 1) == (Kernel(64, 64, True, True), 10)
    assert pick(512, 1536, 512, 1) == (Kernel(128, 64, False, True), 96)
    assert pick(64, 64, 256, 1000) == (Kernel(64, 64, True, True), 1000)
    assert pick(128, 128, 512, 100_000) == (Kernel(128, 128, True, True), 100_000)  # beyond a grid's y and z


@pytest.mark.parametrize(
    ("capability", "side"), [((8, 0), 128), ((8, 6), 64), ((12, 0), 64)], ids=lambda value: str(value)
)
def test_choice_follows_the_tensor_cores(
    cuda: Products, capability: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are slow, shared memory keeps up with small tiles too, of which fewer are left over."""
    monkeypatch.setattr(cuda, "capability", capability)
    kernel, _ = chosen(cuda, 768, 768, 768, 12, 108, True)
    assert (kernel.block_m, kernel.block_n) == (side, side)


def test_what_a_tile_takes_beside_its_k_counts(cuda: Products) -> None:
    """Small tiles leave less over, which pays where k is long: they fill and store once more."""
    tiles = [chosen(cuda, 128, 128, k, 140, 108, True)[0].block_m for k in (32, 4096)]
    assert tiles == [128, 64]


def test_what_does_not_fit_is_refused(cuda: Products) -> None:
    A, X, out = torch.ones(2, 8, 8).bfloat16(), torch.ones(2, 8, 9).bfloat16(), torch.ones(2, 8, 9).bfloat16()
    for arguments in checks.unfit():
        good = cuda.product(A, X, out)
        with pytest.raises(ValueError, match="do not fit"):
            cuda.run(good, cuda.product(**arguments))
        assert not cuda.log, "launched before all products were checked"
    with pytest.raises(ValueError, match="do not fit"):
        cuda.run(cuda.product(A, X, out), dtype=torch.float32)


def test_devices_before_8_0_are_refused(cuda: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    A, X, out = torch.ones(1, 8, 8).bfloat16(), torch.ones(1, 8, 9).bfloat16(), torch.ones(1, 8, 9).bfloat16()
    monkeypatch.setattr(cuda.runtime, "pretend", lambda *_: None)
    cuda.runtime.device.major = 7
    try:
        with pytest.raises(ValueError, match="capability is below"):
            cuda(A, X, out)
    finally:
        cuda.runtime.device.major = 8


def test_a_failed_launch_is_reported_and_forgotten(cuda: Products) -> None:
    A, X, out = torch.ones(1, 8, 8).bfloat16(), torch.ones(1, 8, 9).bfloat16(), torch.ones(1, 8, 9).bfloat16()
    call = cuda.product(A, X, out)
    cuda.runtime.forget_memory()
    with pytest.raises(LaunchError):
        cuda.run(call)
    assert cuda.log[-1].error == 719
    cuda(A, X, out)


@pytest.mark.parametrize("function", ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaLaunchKernel"])
def test_an_error_is_reported_once(cuda: Products, function: str) -> None:
    """Whatever failed, the next call finds nothing of it."""
    A, X, out = torch.ones(1, 8, 8).bfloat16(), torch.ones(1, 8, 9).bfloat16(), torch.empty(1, 8, 9).bfloat16()
    call = cuda.product(A, X, out)
    with cuda.runtime.options():
        cuda.runtime.fail_next(2, function)
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            cuda.module.cuda.products([call], cuda.module.DType.bf16, 0)
        assert cuda.runtime.last_error == 0
        cuda.module.cuda.products([call], cuda.module.DType.bf16, 0)
    assert torch.equal(out, exact(A, X, False).bfloat16())
    cuda.runtime.forget_memory()
