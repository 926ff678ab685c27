"""The products of triton_kernels as Triton compiles them for sm_80 and sm_90a, run on the CPU, against float64.

A kernel takes seconds to build: sm_80 is asked for everything, sm_90a for what its copies (by TMA, or by threads for
wgmma) can get wrong, and test_backend_triton.py has the logic of more combinations in Triton's interpreter.
"""

from __future__ import annotations

import weakref
from itertools import product as combinations
from typing import Any, NamedTuple

import pytest
import torch
from checks import products as checks
from checks.products import UNIT_ROUNDOFF, empty, exact, integers, placed, symmetric, untouched
from torch import Tensor

pytest.importorskip("triton.language", reason="no triton")

from emulated_gpu import emulated

from muon_kernels.triton_kernels import launch, products
from muon_kernels.triton_kernels.configs import Config, Shape, choose, table, vendor


class Place(NamedTuple):
    arch: int
    tma: bool


PLACES = {"sm80": Place(80, False), "sm90": Place(90, False), "tma": Place(90, True)}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
OPTIONS = ("order", "asynchrony", "seed", "races", "profile", "blocks")
CONFIGS = [(arch, config) for arch in (80, 90) for config in table(arch).configs]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_config = pytest.mark.parametrize(
    ("arch", "config"), CONFIGS, ids=[f"sm{arch}-{c.block_m}x{c.block_n}-{c.num_stages}" for arch, c in CONFIGS]
)
smallest_and_largest = pytest.mark.parametrize(
    ("arch", "config"),
    [(a, table(a).configs[i]) for a in (80, 90) for i in (0, -1)],
    ids=lambda x: f"{x[0]}x{x[1]}" if isinstance(x, Config) else f"sm{x}",
)
SMALL = Config(64, 64, 64, 4, 4, 1.0, 0.0, (1, 1))


class Products:
    """triton_kernels.products.product on an emulated GPU; keywords of the launch go there. `device`: where it ran."""

    def __init__(self, arch: int, config: Config | None = SMALL) -> None:
        self.arch, self.config = arch, config

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, *, multiprocessors: int = 1, **keywords: Any) -> Tensor:
        options = {k: keywords.pop(k) for k in OPTIONS if k in keywords}
        with (
            emulated(self.arch, multiprocessors, guard=True, **options) as self.device,
            pytest.MonkeyPatch.context() as m,
        ):
            products._launch.cache_clear()  # it remembers what it chose
            if self.config:
                m.setattr(products, "choose", lambda *_: self.config)
            products.product(a, b, out, **keywords)
        return out


@pytest.fixture(params=["sm80", "tma"])
def run(request: pytest.FixtureRequest) -> Products:
    arch, tma = PLACES[request.param]
    return Products(arch, SMALL._replace(tma=tma))


def places(*names: str) -> Any:
    """Only there, or there, too."""
    return pytest.mark.parametrize("run", names, indirect=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SIZES = [(1, 7), (3, 1), (17, 0), (17, 7), (63, 1), (65, 7), (129, 2)]


@pytest.mark.parametrize(("m", "batch"), SIZES)
def test_any_size(run: Products, m: int, batch: int) -> None:
    checks.any_shape(run, batch, m, m + 5)


@places("sm80", "sm90")
@pytest.mark.parametrize(("m", "batch"), SIZES)
def test_any_stride(run: Products, m: int, batch: int) -> None:
    checks.any_shape(run, batch, m, m + 5, 2)


@pytest.mark.parametrize(("m", "n"), [(8, 64), (72, 200), (136, 136)])
def test_sizes_of_whole_vectors(run: Products, m: int, n: int) -> None:
    checks.any_shape(run, 2, m, n)


def test_nothing_is_read_behind_the_last_element(run: Products) -> None:
    """Whole vectors are read of ragged rows, but not of the last one."""
    checks.any_shape(run, 2, 64, 69)


@every_config
def test_every_config_is_exact_on_integers(arch: int, config: Config) -> None:
    """Ragged in all directions, with an addend."""
    m, n, k = config.block_m + 40, config.block_n + 24, 3 * config.block_k + 8
    for transposed in [s for s in (False, True) if config.residents[s]]:
        n = m if transposed else n
        a, out = placed(integers(2, m, k)), empty(2, m, n)
        b, c = (a, placed(symmetric(2, m))) if transposed else (placed(integers(2, k, n)), placed(integers(2, m, n)))
        keywords = dict(b_transposed=transposed, symmetric=transposed)
        Products(arch, config)(a, b, out, c=c, alpha=2.0, beta=-4.0, gamma=8.0, **keywords)
        sums = 2 * exact(a, b, transposed) - 4 * c.double() + 8 * torch.eye(m, n)
        assert torch.equal(out, sums.bfloat16()) and untouched(out)


@pytest.mark.parametrize(
    ("run", "which", "width"),
    [("sm80", "a", 8), ("sm80", "c", 2), ("tma", "b", 4), ("tma", "out", 8)],
    indirect=["run"],
)
def test_one_operand_may_be_less_aligned_than_the_others(run: Products, which: str, width: int) -> None:
    checks.one_less_aligned(run, which, width)


@places("sm80")
def test_distance_of_matrices_alone_may_be_odd(run: Products) -> None:
    checks.odd_distance_of_matrices(run)


def test_parts_of_squares_are_exact_on_integers(run: Products) -> None:
    """Corrections of diagonals of any size, so that none can be lost or counted twice unseen."""
    checks.parts_of_squares(run, 65, 16, torch.bfloat16)


@places("sm80")
def test_precise_squares(run: Products) -> None:
    checks.precise_squares(run, 17)


@places("sm80")
@dtypes
def test_error_is_that_of_one_rounding(run: Products, dtype: torch.dtype) -> None:
    """|out - exact| ≤ u |exact| + (k + 4) 2^-24 (Σ|a||b| + |c|): one rounding of a sum in fp32."""
    a, b, c = (torch.randn(1, *shape).to(dtype) for shape in ((72, 328), (328, 136), (72, 136)))
    out = torch.empty_like(c)
    run(a, b, out, c=c, alpha=0.3, beta=1.7)
    alpha, beta = torch.tensor([0.3, 1.7]).double()
    right = alpha * exact(a, b, False) + beta * c.double()
    size = alpha * exact(a.abs(), b.abs(), False) + beta * c.double().abs()
    bound = UNIT_ROUNDOFF[dtype] * right.abs() + (a.shape[2] + 4) * 2**-24 * size + 2**-25  # f16 has subnormals
    assert ((out.double() - right).abs() <= bound).all()


@pytest.mark.parametrize(("run", "transposed"), [("sm80", False), ("tma", True)], indirect=["run"])
def test_bits_depend_on_nothing_but_the_matrix(run: Products, transposed: bool) -> None:
    """Batches, tiles, alignments and orders: the same bits; and symmetric to the last one."""
    X = torch.randn(3, 200, 200).bfloat16()
    small = run.config
    results = []
    for width, config, order in (
        (16, small, "forward"),
        (16, small, "random"),
        (16, table(run.arch).configs[1], "forward"),
        (2, small, "forward"),
    ):
        at, out = placed(X, width), empty(3, 200, 200, width=width)
        Products(run.arch, config)(at, at, out, b_transposed=transposed, symmetric=transposed, order=order)
        results.append(out.clone())
    alone = [empty(1, 200, 200) for _ in range(3)]
    for i, out in enumerate(alone):
        at = placed(X[i : i + 1])
        run(at, at, out, b_transposed=transposed, symmetric=transposed)
    results.append(torch.cat(alone))
    assert all(torch.equal(r, results[0]) for r in results)
    if transposed:
        assert torch.equal(results[0], results[0].mT)


def test_a_result_is_symmetric_even_if_the_product_is_not(run: Products) -> None:
    checks.result_is_symmetric(run)


def test_many_tiles_of_a_triangle(run: Products) -> None:
    """Every tile is at its place, and only those of a triangle are launched."""
    X, out = placed(integers(1, 1304, 8)), empty(1, 1304, 1304)
    run(X, X, out, b_transposed=True, symmetric=True)
    assert run.device.log[-1].grid == (21 * 22 // 2, 1, 1)
    assert torch.equal(out, exact(X, X, True).bfloat16()) and untouched(out)


def stretched(config: Config, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, c and out, of more steps than stages, the last of them ragged; symmetric if b is transposed."""
    k = config.block_k * (config.num_stages + 2) + 8
    m, n = config.block_m + 8, config.block_n + 8
    a = placed(integers(1, m, k))
    b = a if transposed else placed(integers(1, k, n))
    c = placed(symmetric(1, m) if transposed else integers(1, m, n))
    return a, b, c, empty(1, m, m if transposed else n)


@every_config
def test_order_and_time_do_not_matter(arch: int, config: Config) -> None:
    """Threads and blocks in any order, asynchronous copies that land at once, at the last moment, or in between."""
    transposed = config.residents[1] > 0
    a, b, c, out = stretched(config, transposed)
    right = (exact(a, b, transposed) + c.double()).bfloat16()
    orders = ("forward", "backward", "random")
    for order, asynchrony in (
        combinations(orders, ("early", "late", "random"))
        if config.block_m == 64
        else zip(orders, ("random", "late", "early"), strict=True)
    ):
        out.fill_(torch.nan)
        keywords = dict(b_transposed=transposed, symmetric=transposed, c=c, beta=1.0)
        Products(arch, config)(a, b, out, order=order, asynchrony=asynchrony, seed=3, **keywords)
        assert torch.equal(out, right), (order, asynchrony)


@smallest_and_largest
def test_no_races(arch: int, config: Config) -> None:
    transposed = config.residents[1] > 0
    a, b, c, out = stretched(config, transposed)
    run = Products(arch, config)
    keywords = dict(b_transposed=transposed, symmetric=transposed, c=c, beta=1.0)
    run(a, b, out, order="random", asynchrony="late", races=True, **keywords)
    warning = run.device.log[-1].result.warning
    assert not warning or "(the same value)" in warning, warning  # as Triton's tl.sum does it


@every_config
def test_profile(arch: int, config: Config) -> None:
    """Counts that decide speed: no bank conflicts, whole sectors, few instructions beside those of the tensor cores."""
    is_symmetric = config.residents[1] > 0
    m, n, k = (2 * config.block_m, 2 * config.block_n, 512) if is_symmetric else (config.block_m, config.block_n, 512)
    a, c, out = torch.randn(1, m, k).bfloat16(), torch.randn(1, m, n).bfloat16(), torch.empty(1, m, n).bfloat16()
    b = a if is_symmetric else torch.randn(1, k, n).bfloat16()
    run = Products(arch, config)
    run(a, b, out, b_transposed=is_symmetric, symmetric=is_symmetric, c=c, beta=1.0, profile=True)
    profile = run.device.log[-1].result.profile
    tiles, block = config.tiles(m, n, is_symmetric), config.block_m * config.block_n
    # A warp's mma.sync is 16 x 8 x 16; a warp group's wgmma, which four warps run, 64 x n x 16 for the n of its tile.
    if arch == 80:
        assert profile.tensor_instructions == tiles * block * k / 2048
        assert profile.other_per_tensor <= 8
    else:
        assert profile.tensor_instructions >= tiles * block * k / (64 * 256 * 16 / 4)
        assert not any(row.op.startswith("mma.") for row in profile.rows)
    assert profile.bank_conflicts == 0, profile.table()
    assert profile.sector_efficiency >= 0.99, profile.table()
    operand_bytes = tiles * (config.block_m + config.block_n) * k * 2
    assert profile.global_bytes == operand_bytes + tiles * block * 2 + m * n * 2
    stores = [r for r in profile.rows if r.op.startswith("st.global")]
    assert stores and all(r.op.startswith("st.global.v4") for r in stores)


def test_numbers_do_not_compile_anew(run: Products) -> None:
    """Batch, sizes, strides, coefficients and scales are run-time values: one compilation for all."""
    compiled: list[Any] = []
    for batch, m, n in ((1, 8, 16), (1, 16, 16), (2, 24, 40), (5, 8, 8), (3, 72, 1024)):
        for alpha, beta in ((1.0, 0.0), (0.5, -2.0)):
            A, X, C = (placed(integers(batch, m, k)) for k in (m, n, n))
            out, scale = empty(batch, m, n), torch.arange(batch + 2.0)[1:-1]
            run(A, X, out, c=C, alpha=alpha, beta=beta, gamma=alpha, scale=scale, a_diagonal=torch.zeros(batch, m))
            compiled += run.device.compiled
    assert len(compiled) <= 1  # none if another test was first


def test_a_launch_is_remembered_and_no_memory_with_it(run: Products) -> None:
    """With its descriptors, for other coefficients. Other operands are not taken for it."""
    products._launch.cache_clear()
    A, out = integers(2, 72, 72), torch.empty(2, 72, 72).bfloat16()
    B = integers(2, 72, 72)
    with emulated(run.arch, guard=True), pytest.MonkeyPatch.context() as m:
        m.setattr(products, "choose", lambda *_: run.config)
        for a, alpha in ((A, 1.0), (A, -2.0), (B, 1.0)):
            products.product(a, A, out, alpha=alpha)
            assert torch.equal(out, (alpha * exact(a, A, False)).bfloat16())
    assert products._launch.cache_info()[:2] == (1, 2)
    kept = weakref.ref(B)
    del B, a
    assert kept() is None


def test_without_columns_only_the_addends_are_left(run: Products) -> None:
    checks.without_columns(run, 17)
    X, out = torch.empty(2, 24, 8).bfloat16()[:, :, :0], empty(2, 24, 24)  # rows aligned for TMA, were there any
    run(X, X, out, b_transposed=True, symmetric=True, gamma=3.0)
    assert torch.equal(out, 3 * torch.eye(24).bfloat16().expand(2, 24, 24)) and untouched(out)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do_is_nothing_launched(run: Products, shape: tuple[int, int, int]) -> None:
    batch, m, n = shape
    run(torch.empty(batch, m, 4).bfloat16(), torch.empty(batch, 4, n).bfloat16(), torch.empty(batch, m, n).bfloat16())
    assert not run.device.log


def test_nan_stays_in_its_matrix(run: Products) -> None:
    checks.nan_stays_in_its_matrix(run)


def test_offsets_have_64_bits(run: Products) -> None:
    checks.offsets_have_64_bits(run)


@places("sm80")
def test_many_matrices_take_one_launch(run: Products) -> None:
    checks.many_matrices(run)
    assert [ran.grid for ran in run.device.log] == [(checks.MANY, 1, 1)]


@pytest.mark.parametrize("case", range(8))
def test_what_does_not_fit_is_refused(run: Products, case: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        run(**checks.unfit()[case])
    assert not run.device.log


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_left_to_the_vendor_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers that are exact in fp32, and not in 16 bits before the end: a gemm with all that it can have."""
    monkeypatch.setattr(products, "vendor", lambda *_: True)
    run = Products(80, None)
    A, X, C = (placed(9 * integers(2, *shape, dtype=dtype)) for shape in ((72, 72), (72, 200), (72, 200)))
    lost, scale = torch.full((2, 72), 2.0**-6), torch.tensor([0.5, 2.0])
    a = A.double() + lost.double().diag_embed()
    for c in (C, X, None):
        out = empty(2, 72, 200, dtype)
        run(A, X, out, c=c, a_diagonal=lost, alpha=2.0, beta=-4.0, scale=scale)
        sums = 2 * a @ X.double() - (0 if c is None else 4 * c.double())
        assert torch.equal(out, (scale[:, None, None] * sums).to(dtype)) and untouched(out)
        assert not run.device.log
    out = empty(2, 72, 200, dtype)
    with launch.rehearsal():
        run(A, X, out)
    assert out.isnan().all()
    (recorded,), _ = launch.recorded(lambda: run(A, X, out))
    assert out.isnan().all()
    recorded()
    assert torch.equal(out, exact(A, X, False).to(dtype)) and untouched(out)


def test_what_is_left_to_the_vendor() -> None:
    """Nothing where tensor cores are kept busy, and no symmetric product."""
    large = Shape(1, 16384, 53248, 16384, False)
    assert [arch for arch in (80, 86, 89, 90, 100, 103, 120, "gfx942") if vendor(large, table(arch))] == [100, 103]
    assert not vendor(large._replace(symmetric=True, n=16384), table(100))
    assert vendor(large._replace(m=4096, k=4096), table(100))
    assert not vendor(large._replace(m=2048, k=2048), table(100))


def chosen(arch: int | str, multiprocessors: int, shape: Shape) -> tuple[int, int]:
    return choose(shape, table(arch), multiprocessors)[:2]


@pytest.mark.parametrize(("arch", "multiprocessors"), [(80, 108), (90, 132), (100, 148), (120, 170), ("gfx942", 304)])
def test_choice_of_tiles(arch: int | str, multiprocessors: int) -> None:
    """Large tiles as soon as they fill the GPU, small ones before; square ones where half of them is left out."""
    assert chosen(arch, multiprocessors, Shape(4, 4096, 4096, 4096, True)) == (128, 128)
    assert chosen(arch, multiprocessors, Shape(1, 256, 256, 1024, True)) == (64, 64)
    assert chosen(arch, multiprocessors, Shape(1, 4096, 11008, 4096, False)) in ((128, 128), (128, 256))
    assert len(table(arch).configs) <= 12
