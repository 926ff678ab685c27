"""Tables of what Triton kernels are run with, by architecture and shape, so that nothing is tuned where a step runs."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Shape of a product: `batch` times m x k by k x n."""

    batch: int
    m: int
    n: int
    k: int
    symmetric: bool


class Config(NamedTuple):
    """Tiles of block_m x block_n, in steps of block_k, by num_warps warps; num_stages as Triton counts them.

    Attributes:
        cost: of an element of the result and a k of 1, relative to the best tile of the architecture. A count, not a
            time: what tensor cores need for a step, or if that is more what shared memory needs to take its operands
            and to give them, at 128 bytes a clock, or what the second-level cache needs to give them.
        fixed: what a tile takes beside its k, to fill its stages, to read addends and to store, as so many k.
        residents: programs that a multiprocessor has at once, of products and of symmetric ones: while one fills or
            stores, the others multiply. 0: it is no candidate for these.
        tma: where operands are aligned, tiles of them are copied by one instruction, and no thread computes addresses.
        registers: most that a thread may have, so that the residents fit; None: as many as the compiler likes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    cost: float
    fixed: float
    residents: tuple[int, int]
    tma: bool = False
    registers: int | None = None

    def tiles(self, m: int, n: int, symmetric: bool) -> int:
        """Return the number of tiles of a matrix."""
        tiles_m, tiles_n = -(-m // self.block_m), -(-n // self.block_n)
        return tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n


class Table(NamedTuple):
    """Table that products on a kind of GPU are chosen from.

    Attributes:
        configs: the candidates.
        vendor_from: from which size on, the smallest of m, n and k, the vendor's library does a product that is no
            symmetric one; None: never.
    """

    configs: tuple[Config, ...]
    vendor_from: int | None = None


# Every entry, with every kind of addend, compiles without spills, and none has a bank conflict where tools/ptx can
# count them. The share behind an entry: of the clocks that tensor cores need for the loop, how many a scheduler issues
# other instructions in, copies and their addresses mostly. Counted in SASS; no GPU was timed.
#
# `fixed` is counted from two published calibrations on H100: kernels like these take 3.5 us for a tile of 128 x 128 and
# 4 us for one of 128 x 256 beside their k (LeetCUDA 416; TLX 1038, one program for each tile and persistent). Smaller
# tiles have less to store: 3 and 2 us. Other architectures are taken to need as many. `tune` measures it.
#
# mma.sync takes a k of 16 for 16 x 8 elements in two clocks; a warp reads its operands from shared memory. Eight warps
# share the large tiles: with four, the addends do not fit into registers beside the sums. All fit into 100 KiB.
_MMA = (
    Config(128, 256, 32, 8, 4, 1.0, 140, (1, 0)),  # 24 %
    Config(128, 128, 32, 8, 4, 1.0, 245, (1, 1)),  # 35 %
    Config(128, 64, 32, 4, 4, 1.125, 375, (2, 0)),  # 36 %; three with some versions of Triton
    Config(64, 64, 64, 4, 4, 1.5, 375, (3, 3)),  # 42 %
)
# From 8.6 on, mma.sync takes four clocks (A10, L40) or eight (GeForce): shared memory keeps up with every tile, and
# fewer k fit into the time of a fill. A multiprocessor has 100 KiB, for two programs at most. The smallest tile asks
# the cache for a byte every 32 FLOPs, about what a 4090 has.
_SLOW_MMA = tuple(
    c._replace(cost=cost, fixed=c.fixed / 2, residents=(min(2, c.residents[0]), min(2, c.residents[1])))
    for c, cost in zip(_MMA, (1.0, 1.0, 1.0, 1.1), strict=True)
)
# By compute capability (10 times major plus minor), or AMD's name of an architecture.
#
# About `vendor_from`: beside cuBLAS, the diagonal's corrections and the addend are passes over sums in fp32, about 25
# bytes an element that our kernels do not move.
# sm_100: shared memory takes and gives the operands of 128 x 256 tiles in 1.5 times the clocks that tensor cores need,
# and cuBLAS's pairs of multiprocessors share 256 x 256. At 4096 cuBLAS reaches 1,359 TFLOP/s, kernels like ours 914
# (learn-cuda 1454f8b, B200): the passes, at 8 TB/s, are paid for from m = n = k = 4,400 on.
# sm_90: 128 x 256 keeps tensor cores busy, by the same count, and quack's fused aX + BX, with tiles like these, beats
# cuBLAS's baddbmm (Gram-NS blog, H100). sm_80, 89: flash-muon's mma.sync kernels are 1.7 to 1.9 times as fast as cuBLAS
# with half its FLOPs (A100, 4090, m >= 4096), so at its speed. sm_120 has that instruction, and nobody published it.
# Symmetric products are never left to cuBLAS: it needs twice the FLOPs. What it was measured to win, one matrix with
# m <= 1024 (flash-muon on H800: 0.0112 ms against 0.0124) without addends, it loses again with one pass of addends.
TABLES: dict[int | str, Table] = {
    80: Table(_MMA),
    86: Table(_SLOW_MMA),
    # wgmma reads both operands from shared memory: 64 x 256 elements in 128 clocks for a k of 16. The small tiles wait
    # for the cache, which is taken to give 5,120 bytes a clock as an A100's does.
    90: Table(
        (
            Config(128, 256, 64, 8, 4, 1.0, 350, (1, 0), tma=True),  # 16 %
            Config(128, 128, 64, 8, 4, 1.25, 545, (0, 1), tma=True),  # 32 %
            Config(128, 128, 64, 8, 3, 1.25, 545, (2, 0), tma=True, registers=128),
            Config(128, 64, 64, 4, 4, 2.0, 580, (2, 0), tma=True),  # 35 %
            Config(64, 64, 64, 4, 4, 2.6, 600, (3, 3), tma=True),  # 62 %
        ),
    ),
    # tcgen05 takes 128 x 128 elements in 64 clocks, and 64 rows take as long as 128.
    100: Table(
        (
            Config(128, 256, 64, 8, 4, 1.0, 780, (1, 0), tma=True),  # 38 %
            Config(128, 128, 64, 8, 4, 1.333, 1020, (1, 1), tma=True),  # 75 %
            Config(128, 64, 64, 4, 4, 2.0, 1170, (2, 0), tma=True),  # 64 %
            Config(64, 64, 64, 4, 4, 2.667, 1170, (3, 3), tma=True),  # 63 %
        ),
        vendor_from=4096,
    ),
    # mma.sync again, no wgmma, no tcgen05. By sm_80's clocks 13, 24, 24 and 25 %, but its tensor cores take two to four
    # times as many.
    120: Table(tuple(c._replace(tma=True) for c in _SLOW_MMA)),
    # mfma takes 128 x 128 elements in 256 clocks. A block may have 64 KiB.
    "gfx942": Table(
        (
            Config(128, 128, 32, 4, 2, 1.0, 390, (1, 1)),  # 15 %
            Config(64, 64, 64, 4, 2, 1.5, 700, (1, 1)),  # 38 %
        ),
    ),
}


def table(target: object) -> Table:
    """The candidates for an architecture, as shipped."""
    if isinstance(target, int):
        return TABLES[max(a for a in TABLES if isinstance(a, int) and a <= target)]
    return TABLES.get(str(target), TABLES["gfx942"])  # the smallest memory of a block; some targets are no strings


def vendor(shape: Shape, table: Table) -> bool:
    """Whether the vendor's library computes this product, because it is faster there."""
    least = table.vendor_from
    return least is not None and not shape.symmetric and min(shape.m, shape.n, shape.k) >= least


def turns_of(config: Config, shape: Shape, multiprocessors: int) -> tuple[int, int]:
    """Return the most tiles that a multiprocessor has, and how many turns these take where residents share one."""
    tiles = -(-shape.batch * config.tiles(shape.m, shape.n, shape.symmetric) // multiprocessors)
    return tiles, -(-tiles // config.residents[shape.symmetric])


def work(config: Config, shape: Shape, multiprocessors: int) -> float:
    """Return what the multiprocessor that has most tiles has to do, as elements times k of the best tile."""
    tiles, turns = turns_of(config, shape, multiprocessors)
    return config.block_m * config.block_n * config.cost * (tiles * shape.k + turns * config.fixed)


def choose(shape: Shape, table: Table, multiprocessors: int) -> Config:
    """The config with which the multiprocessor that has most tiles has least to do, or about as little: the largest.

    A few percent are within what a count can say, and fewer kinds of tiles are fewer compilations.
    """
    took = {c: work(c, shape, multiprocessors) for c in table.configs if c.residents[shape.symmetric]}
    least = min(took.values())
    return max((c for c in took if took[c] <= 1.05 * least), key=lambda c: c.block_m * c.block_n)


# ---- elementwise.py ----

BLOCK = 64  # rows and columns of a tile


def scratch_bytes(rows: int, cols: int) -> int:
    """Return a matrix's bytes of scratch: a double for each tile and as much for the scale, in whole sectors."""
    return -(-8 * (-(-rows // BLOCK) * -(-cols // BLOCK) + 1) // 32) * 32


# ---- fused_step.py ----

FUSED_ROWS = 64  # R, Q and S of more would leave the registers


def block_of(rows: int) -> int:
    """The side of fused_step's tiles; two, since each is a compilation."""
    return 32 if rows <= 32 else 64


def executed_flops(rows: int, cols: int, steps: int, terms: int) -> int:
    """Return a matrix's FLOPs in `fused_step`: a product is three or six of bf16; sizes are rounded up to tiles."""
    m = block_of(rows)
    n = -(-cols // m) * m
    return terms * (terms + 1) // 2 * 2 * m * m * (2 * n + (4 * steps - 3) * m)
