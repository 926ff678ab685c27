"""The products of csrc/cuda on compute capability 9.0: tensor copies, wgmma and persistent blocks, as in
test_products_sm80.py, where what all products share is tested too.
"""

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
from ptx import standin
from torch import Tensor

pytestmark = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")

PINGPONG, PAIR, WIDE = (128, 1), (128, 2), (256, 2)  # columns of a tile, and tiles of a cluster
TILES = {PINGPONG: "pingpong", PAIR: "pair", WIDE: "wide"}
dtypes = pytest.mark.parametrize("dtype", p.DTYPES.values(), ids=p.DTYPES)
kernels = pytest.mark.parametrize("kernel", p.KERNELS_SM90, ids=lambda k: f"{TILES[of(k)]}-{'nt'[k.transposed]}")


def of(kernel: Kernel | None) -> tuple[int, int]:
    """What tiles a kernel has, if it is one of product_sm90.cu."""
    assert kernel and kernel.wgmma
    return kernel.block_n, kernel.cluster


@pytest.fixture(scope="module")
def cuda(built: tuple[ModuleType, standin.Runtime]) -> Products:
    return Products(*built, capability=(9, 0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def operands(kernel: Kernel, batch: int, dtype: torch.dtype, make: Any = integers) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and an output that this kernel is chosen for."""
    m, n, k = p.KERNELS_SM90[kernel]
    a = placed(make(batch, m, k, dtype=dtype))
    b = a if kernel.transposed else placed(make(batch, k, n, dtype=dtype))
    return a, b, empty(batch, m, n, dtype)


@dtypes
@kernels
def test_every_kernel_is_exact_on_integers(cuda: Products, kernel: Kernel, dtype: torch.dtype) -> None:
    a, b, out = operands(kernel, 2, dtype)
    c = placed(integers(*out.shape, dtype=dtype))
    scale = torch.tensor([0.5, 2.0])
    keywords = dict(c=c, alpha=2.0, beta=-4.0, gamma=8.0, scale=scale, multiprocessors=kernel.cluster)
    cuda(a, b, out, b_transposed=kernel.transposed, **keywords)
    assert cuda.kernel == kernel
    scales = (scale**2 if kernel.transposed else scale)[:, None, None]
    sums = 2 * exact(a, b, kernel.transposed) - 4 * c.double() + 8 * torch.eye(*out.shape[1:])
    assert torch.equal(out, (scales * sums).to(dtype))
    assert untouched(out)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("m", [1, 3, 17, 63, 65, 129])
def test_any_size(cuda: Products, m: int, batch: int) -> None:
    """On one multiprocessor, which takes tile after tile, and on many."""
    for n, multiprocessors in ((m + 5, 1), (2 * m + 1, 132)):
        checks.any_shape(partial(cuda, multiprocessors=multiprocessors), batch, m, n)
        assert cuda.kernel and cuda.kernel.wgmma and cuda.log[-1].grid[0] <= multiprocessors


@pytest.mark.parametrize("which", ["a", "b", "c", "out"])
def test_what_no_map_describes_is_left_to_sm80(cuda: Products, which: str) -> None:
    checks.one_less_aligned(cuda, which, 8)
    assert cuda.kernel and not cuda.kernel.wgmma


def test_distance_of_matrices_alone_may_be_odd(cuda: Products) -> None:
    checks.odd_distance_of_matrices(cuda)
    assert cuda.kernel and not cuda.kernel.wgmma


@dtypes
@pytest.mark.parametrize(
    ("m", "multiprocessors", "tiles"),
    [
        *((m, n, PINGPONG) for m, n in ((1, 1), (17, 1), (63, 132), (65, 1), (129, 2), (184, 3))),
        (392, 12, PAIR),
        (392, 24, WIDE),
    ],
    ids=str,
)
def test_parts_of_squares_are_exact_on_integers(
    cuda: Products, m: int, multiprocessors: int, tiles: tuple[int, int], dtype: torch.dtype
) -> None:
    """The last two fill half a wave of wide tiles, or all of one."""
    ran = set()

    def run(*args: Any, **keywords: Any) -> None:
        cuda(*args, multiprocessors=multiprocessors, **keywords)
        ran.add((of(cuda.kernel), keywords.get("symmetric", False)))

    checks.parts_of_squares(run, m, 16, dtype)
    assert {t for t, is_symmetric in ran if is_symmetric} == {tiles}


@dtypes
@kernels
def test_error_is_that_of_one_rounding(cuda: Products, kernel: Kernel, dtype: torch.dtype) -> None:
    """|out - exact| ≤ u |exact| + (k + 4) 2^-24 (Σ|a||b| + |c|): one rounding of a sum in fp32."""
    make = lambda *shape, dtype: torch.randn(shape).to(dtype)
    a, b, out = operands(kernel, 1, dtype, make)
    c = make(*out.shape, dtype=dtype)
    keywords = dict(c=placed(c), alpha=0.3, beta=1.7, multiprocessors=kernel.cluster)
    cuda(a, b, out, b_transposed=kernel.transposed, **keywords)
    assert cuda.kernel == kernel
    alpha, beta = torch.tensor([0.3, 1.7]).double()
    right = alpha * exact(a, b, kernel.transposed) + beta * c.double()
    size = alpha * exact(a.abs(), b.abs(), kernel.transposed) + beta * c.double().abs()
    bound = UNIT_ROUNDOFF[dtype] * right.abs() + (a.shape[2] + 4) * 2**-24 * size + 2**-25  # f16 has subnormals
    assert ((out.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("m", [17, 72, 136])
def test_precise_squares(cuda: Products, m: int) -> None:
    checks.precise_squares(cuda, m)
    assert cuda.kernel and cuda.kernel.wgmma


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_bits_depend_on_nothing_but_the_matrix(cuda: Products, is_symmetric: bool) -> None:
    """Runs, batches, tiles, multiprocessors and orders: the same bits; and symmetric to the last one."""
    X = placed(torch.randn(3, 200, 392).bfloat16())
    keywords = dict(b_transposed=True, symmetric=is_symmetric)
    results, ran = [], set()
    for batch, multiprocessors, order in ((3, 1, "forward"), (3, 2, "random"), (3, 132, "forward"), (1, 2, "backward")):
        out = empty(3, 200, 200)
        for i in range(0, 3, batch):
            at = X[i : i + batch]
            cuda(at, at, out[i : i + batch], multiprocessors=multiprocessors, order=order, **keywords)
            ran.add(of(cuda.kernel))
        results.append(out.clone())
    assert ran == ({PINGPONG, WIDE} if is_symmetric else {PINGPONG, PAIR, WIDE})
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0], results[0].mT) or not is_symmetric


def test_a_result_is_symmetric_even_if_the_product_is_not(cuda: Products) -> None:
    for multiprocessors in (1, 132):
        checks.result_is_symmetric(partial(cuda, multiprocessors=multiprocessors))


@pytest.mark.parametrize(
    ("tiles", "m", "k", "multiprocessors", "count"),
    [(PINGPONG, 1300, 8, 1, 66), (PAIR, 2100, 8, 10**6, 180), (WIDE, 1300, 456, 42, 42)],
    ids=[TILES[t] for t in (PINGPONG, PAIR, WIDE)],
)
def test_many_tiles_of_a_triangle(
    cuda: Products, tiles: tuple[int, int], m: int, k: int, multiprocessors: int, count: int
) -> None:
    """Every tile is at its place, and only those of a triangle are computed: two and three supertiles of a side."""
    X, out = placed(integers(1, m, k)), empty(1, m, m)
    cuda(X, X, out, b_transposed=True, symmetric=True, multiprocessors=multiprocessors)
    assert of(cuda.kernel) == tiles and cuda.log[-1].grid == (min(count, multiprocessors), 1, 1)
    assert torch.equal(out, exact(X, X, True).bfloat16()) and untouched(out)


@pytest.mark.parametrize("shape", [(1, 2100, 300, 8), (2, 400, 1700, 8)], ids=str)
def test_many_tiles_of_a_rectangle(cuda: Products, shape: tuple[int, int, int, int]) -> None:
    """More rows of tiles than a group has, and more columns than rows."""
    batch, m, n, k = shape
    A, X, out = placed(integers(batch, m, k)), placed(integers(batch, k, n)), empty(batch, m, n)
    for multiprocessors, tiles in ((7, PINGPONG), (6, PAIR)):
        out.fill_(torch.nan)
        cuda(A, X, out, multiprocessors=multiprocessors)
        assert of(cuda.kernel) == tiles and cuda.log[-1].grid == (multiprocessors, 1, 1)
        assert torch.equal(out, exact(A, X, False).bfloat16()) and untouched(out)


@kernels
def test_order_and_time_do_not_matter(cuda: Products, kernel: Kernel) -> None:
    """Threads and blocks in any order, asynchronous copies that land at once, at the last moment, or in between."""
    a, b, out = operands(kernel, 2, torch.bfloat16)
    c = placed(symmetric(2, out.shape[1]) if kernel.transposed else integers(*out.shape))
    right = (exact(a, b, kernel.transposed) + c.double()).bfloat16()
    for order, asynchrony in product(("forward", "backward", "random"), ("early", "late", "random")):
        out.fill_(torch.nan)
        keywords = dict(b_transposed=kernel.transposed, c=c, beta=1.0, multiprocessors=kernel.cluster)
        cuda(a, b, out, order=order, asynchrony=asynchrony, seed=3, **keywords)
        assert cuda.kernel == kernel
        assert torch.equal(out, right), (order, asynchrony)
        assert not any(launch.warnings for launch in cuda.log), "as of copies that a block leaves behind"


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_consumers_take_turns(cuda: Products, order: Any) -> None:
    """Also where the second one's first stage is of the ring's second round, which its parity does not tell."""
    X, out = placed(integers(2, 200, 392)), empty(2, 200, 200)
    for asynchrony in ("early", "late"):
        out.fill_(torch.nan)
        cuda(X, X, out, b_transposed=True, multiprocessors=1, order=order, asynchrony=asynchrony)
        assert of(cuda.kernel) == PINGPONG
        assert torch.equal(out, exact(X, X, True).bfloat16()), asynchrony


@pytest.mark.parametrize(
    ("tiles", "m", "k", "multiprocessors"),
    [(PINGPONG, 200, 104, 1), (PAIR, 392, 104, 12), (WIDE, 392, 392, 12)],
    ids=[TILES[t] for t in (PINGPONG, PAIR, WIDE)],
)
def test_no_races(cuda: Products, tiles: tuple[int, int], m: int, k: int, multiprocessors: int) -> None:
    """Many tiles a block, with and without addends; symmetric, so that all kinds of blocks are stored."""
    X, C, out = placed(integers(4, m, k)), placed(symmetric(4, m)), empty(4, m, m)
    for c in (C, None):
        keywords = dict(b_transposed=True, symmetric=True, c=c, beta=1.0)
        cuda(X, X, out, order="random", races=True, multiprocessors=multiprocessors, **keywords)
        assert of(cuda.kernel) == tiles and [launch.cluster for launch in cuda.log] == [tiles[1]]
        assert not any(launch.warnings for launch in cuda.log)
        assert torch.equal(out, (exact(X, X, True) + (0 if c is None else c.double())).bfloat16())


@pytest.mark.parametrize(
    ("tiles", "m", "multiprocessors"),
    [(PINGPONG, 136, 1), (PAIR, 136, 2), (WIDE, 392, 8)],
    ids=[TILES[t] for t in (PINGPONG, PAIR, WIDE)],
)
def test_no_races_of_vectors(cuda: Products, tiles: tuple[int, int], m: int, multiprocessors: int) -> None:
    """Rows beyond the edge, of which a wide tile's second consumer has nothing else, store nothing."""
    A, X, out = placed(symmetric(3, m)), placed(integers(3, m, m)), empty(3, m, m)
    of_a, of_b = integers(3, m).float(), integers(3, m).float()
    keywords = dict(multiprocessors=multiprocessors, order="random", races=True)
    cuda(A, X, out, a_diagonal=of_a, b_diagonal=of_b, **keywords)
    assert of(cuda.kernel) == tiles
    assert not any(launch.warnings for launch in cuda.log)
    right = (A.double() + of_a.double().diag_embed()) @ (X.double() + of_b.double().diag_embed())
    assert torch.equal(out, right.bfloat16())


# Of the issue slots of tensor clocks, what instructions of PTX beside wgmma may take at 4096 columns of a.
OTHERS = {PINGPONG: 0.25, PAIR: 0.25, WIDE: 0.15}
# FLOPs for a byte of operands from L2.
INTENSITY = {PINGPONG: 64, PAIR: 85 + 1 / 3, WIDE: 128}


@pytest.mark.parametrize("tiles", TILES, ids=TILES.values())
def test_profile(cuda: Products, tiles: tuple[int, int]) -> None:
    """Bytes from L2 for what tensor cores do, no bank conflicts, and what else is issued.

    Two numbers of columns of a tell what a step takes from what a tile takes.
    """
    issued = {}
    columns, cluster = tiles
    for k in (512, 1024):
        if tiles == WIDE:
            m, n, count = 256, 512, 4
            a, b, c = placed(integers(1, m, k)), placed(integers(1, k, n)), integers(1, m, n)
        else:
            m, n, count = 512, 512, 10 if tiles == PINGPONG else 12
            a = b = placed(integers(1, m, k))
            c = symmetric(1, m)
        keywords = dict(b_transposed=a is b, symmetric=a is b, c=placed(c), beta=1.0)
        cuda(a, b, empty(1, m, n), multiprocessors=count, profile=True, **keywords)
        assert cuda.kernel == Kernel(128, columns, a is b, True, cluster)
        profile = cuda.profiles[cuda.kernel]
        operand_bytes, flops = count * (128 + columns // cluster) * k * 2, 2 * count * 128 * columns * k
        assert flops / operand_bytes == INTENSITY[tiles]
        assert profile.global_bytes == operand_bytes + count * 128 * columns * 2 + m * n * 2, profile.table()
        assert profile.bank_conflicts == 0, profile.table()
        assert profile.tensor_instructions == flops / 2 / (16 * 16 * columns), "16 rows a warp"
        issued[k] = (profile.instructions - profile.tensor_instructions) / count
    of_step = (issued[1024] - issued[512]) / 8
    at_4096 = issued[1024] + 48 * of_step
    assert at_4096 / 4 <= OTHERS[tiles] * 64 * columns * 4, (of_step, issued)


@pytest.mark.parametrize("m", [1, 65])
def test_without_columns_only_the_addends_are_left(cuda: Products, m: int) -> None:
    checks.without_columns(cuda, m)
    assert cuda.kernel and not cuda.kernel.wgmma, "there are no maps of nothing"


def test_nan_stays_in_its_matrix(cuda: Products) -> None:
    X = torch.randn(3, 33, 72).bfloat16()
    X[1, 4, 64] = torch.nan
    out = empty(3, 33, 33)
    cuda(X, X, out, b_transposed=True, symmetric=True)
    assert cuda.kernel and cuda.kernel.wgmma
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()


def test_offsets_have_64_bits(cuda: Products) -> None:
    checks.offsets_have_64_bits(cuda)
    assert cuda.kernel and cuda.kernel.wgmma


@pytest.mark.parametrize(("multiprocessors", "of_12", "of_24"), [(132, PINGPONG, PAIR), (114, PAIR, WIDE)])
def test_choice_of_tiles(cuda: Products, multiprocessors: int, of_12: tuple[int, int], of_24: tuple[int, int]) -> None:
    """Wide tiles where they fill the GPU, pairs where L2 would not keep up, and a block a multiprocessor."""
    pick = lambda *shape: chosen(cuda, *shape, multiprocessors, shape[0] == shape[1])
    kernel = lambda tiles, transposed: Kernel(128, tiles[0], transposed, True, tiles[1])
    assert pick(4096, 11008, 4096, 1) == (kernel(WIDE, False), multiprocessors)
    assert chosen(cuda, 4096, 11008, 4096, 1, 133, False) == (kernel(WIDE, False), 132), "whole clusters"
    assert pick(8192, 8192, 8192, 1) == pick(4096, 4096, 4096, 1) == (kernel(WIDE, True), multiprocessors)
    assert pick(768, 768, 768, 12) == (kernel(of_12, True), multiprocessors), "fewest whole waves"
    assert pick(768, 768, 768, 24) == (kernel(of_24, True), multiprocessors)
    assert pick(256, 256, 1024, 1) == (kernel(PINGPONG, True), 3)
    assert pick(1024, 1024, 1024, 1) == (kernel(PAIR, True), 40), "fewest bytes, in one wave"


@pytest.mark.parametrize("function", ["cudaFuncSetAttribute", "cudaLaunchKernel"])
def test_an_error_is_reported_once(cuda: Products, function: str) -> None:
    """Whatever failed, the next call finds nothing of it."""
    A, X, out = integers(1, 8, 8), integers(1, 8, 16), torch.empty(1, 8, 16).bfloat16()
    call = cuda.product(A, X, out)
    cuda.runtime.pretend(9, 0)
    with cuda.runtime.options():
        cuda.runtime.fail_next(2, function)
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            cuda.module.cuda.products([call], cuda.module.DType.bf16, 0)
        assert cuda.runtime.last_error == 0
        cuda.module.cuda.products([call], cuda.module.DType.bf16, 0)
    cuda.runtime.pretend(8, 0)
    assert torch.equal(out, exact(A, X, False).bfloat16())
    cuda.runtime.forget_memory()
